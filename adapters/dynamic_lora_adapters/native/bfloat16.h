// Products of weights in bfloat16, summed in float32.
//
// Where the processor multiplies pairs of bfloat16 (AVX-512-BF16) faster than floats, inputs are
// rounded to it too, and one instruction multiplies twice as many as one in float32. Elsewhere inputs
// stay as they are, and the weights are widened in registers: half the memory is read.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "rounded.h"
#include "vectors.h"

namespace dynamic_lora {

// The upper half of a float's bits.
struct BFloat16 {
  uint16_t bits;
};

// Rounded to the nearest, to the even one of two as near.
inline BFloat16 to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  // Rounding up could make an infinity of a NaN.
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
  return {static_cast<uint16_t>(is_nan ? (bits >> 16) | 0x40 : rounded)};
}

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// kLanes neighbouring values, widened.
inline Vec load(const BFloat16* p) {
#if defined(__AVX512F__)
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
#elif defined(__AVX2__)
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
#else
  Vec wide;
  UNROLL
  for (int i = 0; i < kLanes; i++) wide[i] = to_float(p[i]);
  return wide;
#endif
}

// A pair of weights in each lane: the first of each, widened, or the second.
template <bool Second>
inline Vec widened(const BFloat16* pairs_of) {
  typedef int32_t Bits __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));
  const IntVec bits = *reinterpret_cast<const Bits*>(pairs_of);
  const IntVec high = Second ? bits & static_cast<int32_t>(0xffff0000) : bits << 16;
  return reinterpret_cast<const Vec&>(high);
}

// Whether numbers that lie side by side are read as pairs: one read of memory then gives two vectors,
// of every second number each.
template <typename Number>
constexpr bool kInPairs = kLanes == 16 && std::is_same_v<Number, BFloat16>;

// Half of 2 * kLanes neighbours: of those in pairs the first or the second of each pair.
template <bool Second>
inline Vec half_of(const BFloat16* p) {
  if constexpr (kInPairs<BFloat16>) return widened<Second>(p);
  return load(p + Second * kLanes);
}
template <bool Second>
inline Vec half_of(const float* p) {
  return load(p + Second * kLanes);
}

#if defined(__AVX512F__)

// 2 * kLanes neighbours in such halves, and back.
inline void part_pairs(const float* from, float* to) {
  const __m512i evens = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odds = _mm512_add_epi32(evens, _mm512_set1_epi32(1));
  const __m512 one = _mm512_loadu_ps(from), other = _mm512_loadu_ps(from + kLanes);
  _mm512_storeu_ps(to, _mm512_permutex2var_ps(one, evens, other));
  _mm512_storeu_ps(to + kLanes, _mm512_permutex2var_ps(one, odds, other));
}
inline void join_pairs(Vec evens, Vec odds, float* to) {
  const __m512i lower = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i upper = _mm512_add_epi32(lower, _mm512_set1_epi32(8));
  const auto one = reinterpret_cast<__m512>(evens), other = reinterpret_cast<__m512>(odds);
  _mm512_storeu_ps(to, _mm512_permutex2var_ps(one, lower, other));
  _mm512_storeu_ps(to + kLanes, _mm512_permutex2var_ps(one, upper, other));
}

#else

inline void part_pairs(const float*, float*) {}
inline void join_pairs(Vec, Vec, float*) {}

#endif

// Adds x [Rows, depth] times a panel slice [ceil(depth / 2), Vecs * kLanes, 2] to y, or, where
// that is `fresh`, writes it there.
template <int Rows, int Vecs>
__attribute__((noinline)) void widening_tile(const float* x, int64_t ldx, const BFloat16* panel,
                                             int64_t depth, bool fresh, float* y, int64_t ldy,
                                             Ahead ahead) {
  constexpr int kWide = Vecs * kLanes;
  Vec sums[Rows][Vecs];
  begin_sums(fresh, y, ldy, sums);
  const auto add = [&](auto second, int64_t i) __attribute__((always_inline)) {
    constexpr bool kSecond = decltype(second)::value;
    Vec weights[Vecs];
    UNROLL
    for (int v = 0; v < Vecs; v++)
      weights[v] = widened<kSecond>(panel + i * kWide + v * 2 * kLanes);
    UNROLL
    for (int r = 0; r < Rows; r++) {
      const float input = x[r * ldx + i + kSecond];
      UNROLL
      for (int v = 0; v < Vecs; v++) sums[r][v] += input * weights[v];
    }
  };
  int64_t i = 0;
  for (; i + 2 <= depth; i += 2) {
    add(std::false_type{}, i);
    add(std::true_type{}, i);
    ahead.ask();
  }
  if (i < depth) add(std::false_type{}, i);
  end_sums(sums, y, ldy);
}

#if defined(__AVX512BF16__) && defined(__AVX512F__)

// The same for x [Rows, depth] in bfloat16.
template <int Rows, int Vecs>
__attribute__((noinline)) void bfloat16_tile(const int16_t* x, int64_t ldx, const BFloat16* panel,
                                             int64_t depth, bool fresh, float* y, int64_t ldy,
                                             Ahead ahead) {
  constexpr int kWide = Vecs * kLanes;
  Vec sums[Rows][Vecs];
  begin_sums(fresh, y, ldy, sums);
  for (int64_t i = 0; i < depth; i += 2) {
    __m512i weights[Vecs];
    UNROLL
    for (int v = 0; v < Vecs; v++)
      weights[v] = _mm512_loadu_si512(panel + i * kWide + v * 2 * kLanes);
    UNROLL
    for (int r = 0; r < Rows; r++) {
      const PairVec inputs = every(x + r * ldx + i);
      UNROLL
      for (int v = 0; v < Vecs; v++)
        sums[r][v] = (Vec)_mm512_dpbf16_ps((__m512)sums[r][v], (__m512bh)weights[v],
                                           (__m512bh)inputs);
    }
    ahead.ask();
  }
  end_sums(sums, y, ldy);
}

// Two vectors, rounded, to 2 * kLanes places.
inline void store_bfloat16(int16_t* to, Vec first, Vec second) {
  _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}

// One, to kLanes places.
inline void store_bfloat16(int16_t* to, Vec values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)values));
}

// Rounds row number `row`, x [k], to bfloat16, laid out as `InputCopies` says.
inline void round_row_to_bfloat16(const float* x, int64_t k, int64_t row, InputCopies& out) {
  constexpr int64_t kStep = 2 * kLanes;
  int16_t* to = out.values.data() + row * row_stride<int16_t>(k);
  for (int64_t i = 0; i < k; i += kStep) {
    const int64_t width = std::min(kStep, k - i);
    const __mmask32 there = width == kStep ? ~0u : (1u << width) - 1;
    const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there), x + i);
    const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(there >> 16), x + i + kLanes);
    store_bfloat16(to + i, (Vec)low, (Vec)high);
  }
}

#else

// Never called.
template <int Rows, int Vecs>
void bfloat16_tile(const int16_t*, int64_t, const BFloat16*, int64_t, bool, float*, int64_t,
                   Ahead) {}
inline void store_bfloat16(int16_t*, Vec, Vec) {}
inline void store_bfloat16(int16_t*, Vec) {}
inline void round_row_to_bfloat16(const float*, int64_t, int64_t, InputCopies&) {}

#endif

}  // namespace dynamic_lora
