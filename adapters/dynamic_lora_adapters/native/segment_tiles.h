// The innermost loops of low-rank deltas, for factors in float32, bfloat16 and float16.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "bfloat16.h"
#include "half.h"
#include "vectors.h"

namespace dynamic_lora {

// What tables of factors are kept in. Those in bytes are in tiles (`byte_factors.h`).
enum FactorFormat : int64_t { kFloatFactors, kBFloat16Factors, kHalfFactors, kByteFactors };

inline int64_t factor_bytes(int64_t format) {
  return format == kFloatFactors ? sizeof(float) : sizeof(BFloat16);
}

// What the factors of a segment are kept in, and how they are multiplied: in sixteen bits they are
// widened in registers or, those in bfloat16, multiplied in pairs (where that pays) by inputs that are
// rounded too, as is what they are shrunk to. Sums are float32.
enum class Factors { kFloats, kBFloat16, kHalves, kPaired };

// Of tables that are not multiplied in pairs.
inline Factors widened_factors(int64_t format) {
  return format == kFloatFactors ? Factors::kFloats
         : format == kHalfFactors ? Factors::kHalves
                                  : Factors::kBFloat16;
}

template <typename Kept>
struct WidenedTypes {
  using Factor = Kept;
  using Input = float;
  using Shrunk = float;
};

template <Factors>
struct FactorTypes;
template <>
struct FactorTypes<Factors::kFloats> : WidenedTypes<float> {};
template <>
struct FactorTypes<Factors::kBFloat16> : WidenedTypes<BFloat16> {};
template <>
struct FactorTypes<Factors::kHalves> : WidenedTypes<Half> {};

template <>
struct FactorTypes<Factors::kPaired> {
  using Factor = BFloat16;
  using Input = int16_t;
  using Shrunk = BFloat16;
};

inline void put(float value, float* to) { *to = value; }
inline void put(float value, BFloat16* to) { *to = to_bfloat16(value); }

// Sums of products of rows of x, ldx apart, and of rows of a, `in` apart; asks for the next rows
// of a. Returns how many inputs are in the sums: what is left is fewer than kLanes.
template <typename Factor, int Rows, int Ranks>
__attribute__((always_inline)) inline int64_t add_products(const float* x, int64_t ldx, const Factor* a, int64_t in,
                            Vec (&sums)[Rows][Ranks]) {
  int64_t i = 0;
  for (; i + kLanes <= in; i += kLanes) {
    Vec factors[Ranks];
    UNROLL
    for (int q = 0; q < Ranks; q++) {
      factors[q] = held(load(a + q * in + i));
      __builtin_prefetch(a + (Ranks + q) * in + i);
    }
    UNROLL
    for (int r = 0; r < Rows; r++) {
      const Vec input = held(load(x + r * ldx + i));
      UNROLL
      for (int q = 0; q < Ranks; q++) sums[r][q] += input * factors[q];
    }
  }
  return i;
}

#if defined(__AVX512BF16__) && defined(__AVX512F__)

// The same in pairs, for x in bfloat16 whose rows go on with zeros to a whole vector.
template <typename Factor, int Rows, int Ranks>
__attribute__((always_inline)) inline int64_t add_products(const int16_t* x, int64_t ldx, const Factor* a, int64_t in,
                            Vec (&sums)[Rows][Ranks]) {
  for (int64_t i = 0; i < in; i += 2 * kLanes) {
    const __mmask32 there = in - i < 2 * kLanes ? (1u << (in - i)) - 1 : ~0u;
    __m512i factors[Ranks];
    UNROLL
    for (int q = 0; q < Ranks; q++) {
      factors[q] = held(_mm512_maskz_loadu_epi16(there, a + q * in + i));
      __builtin_prefetch(a + (Ranks + q) * in + i);
    }
    UNROLL
    for (int r = 0; r < Rows; r++) {
      const __m512i input = held(_mm512_loadu_si512(x + r * ldx + i));
      UNROLL
      for (int q = 0; q < Ranks; q++)
        sums[r][q] = (Vec)_mm512_dpbf16_ps((__m512)sums[r][q], (__m512bh)input, (__m512bh)factors[q]);
    }
  }
  return in;
}

#endif

// To shrunk [Rows, rank] what x [Rows, in] gives with Ranks rows of a [rank, in], times `sign`.
template <Factors kind, int Rows, int Ranks>
void shrink_tile(const typename FactorTypes<kind>::Input* x, int64_t ldx,
                 const typename FactorTypes<kind>::Factor* a, int64_t in, float sign, int64_t rank,
                 typename FactorTypes<kind>::Shrunk* shrunk) {
  Vec sums[Rows][Ranks];
  begin_sums(true, nullptr, 0, sums);
  const int64_t added = add_products(x, ldx, a, in, sums);
  UNROLL
  for (int r = 0; r < Rows; r++) {
    float totals[Ranks];
    if constexpr (Ranks == 4)
      sum_each(sums[r], 1.0f, totals);
    else
      for (int q = 0; q < Ranks; q++) totals[q] = sum(sums[r][q]);
    for (int q = 0; q < Ranks; q++) {
      for (int64_t i = added; i < in; i++) totals[q] += x[r * ldx + i] * to_float(a[q * in + i]);
      put(sign * totals[q], shrunk + r * rank + q);
    }
  }
}

// Adds ranks of b, whose rows are ldb apart, to [Rows, Vecs * kLanes] outputs.
template <int Rows, int Vecs, typename Factor>
void expand_tile(const float* shrunk, int64_t rank, const Factor* b, int64_t ldb, int64_t ranks,
                 float* out, int64_t ldo) {
  Vec sums[Rows][Vecs];
  begin_sums(false, out, ldo, sums);
  for (int64_t q = 0; q < ranks; q++) {
    // What the same thread reads next, as a rule: a long way ahead.
    __builtin_prefetch(b + q * ldb + Vecs * kLanes);
    if constexpr (Rows > Vecs) {
      Vec factors[Vecs];
      UNROLL
      for (int v = 0; v < Vecs; v++) factors[v] = held(load(b + q * ldb + v * kLanes));
      UNROLL
      for (int r = 0; r < Rows; r++) {
        const Vec weight = held(all(shrunk[r * rank + q]));
        UNROLL
        for (int v = 0; v < Vecs; v++) sums[r][v] += weight * factors[v];
      }
    } else {
      Vec weights[Rows];
      UNROLL
      for (int r = 0; r < Rows; r++) weights[r] = held(all(shrunk[r * rank + q]));
      UNROLL
      for (int v = 0; v < Vecs; v++) {
        const Vec factors = held(load(b + q * ldb + v * kLanes));
        UNROLL
        for (int r = 0; r < Rows; r++) sums[r][v] += weights[r] * factors;
      }
    }
  }
  end_sums(sums, out, ldo);
}

// Adds Ranks ranks of b to [Rows, width] outputs along the rows of b, which come from memory faster
// so than by tiles.
template <int Rows, int Ranks, typename Shrunk, typename Factor>
void expand_along(const Shrunk* shrunk, int64_t rank, const Factor* b, int64_t ldb, float* out,
                  int64_t ldo, int64_t width) {
  Vec weights[Rows][Ranks];
  UNROLL
  for (int r = 0; r < Rows; r++) {
    UNROLL
    for (int q = 0; q < Ranks; q++) weights[r][q] = held(all(to_float(shrunk[r * rank + q])));
  }
  int64_t c = 0;
  for (; c + kLanes <= width; c += kLanes) {
    Vec factors[Ranks];
    UNROLL
    for (int q = 0; q < Ranks; q++) {
      factors[q] = held(load(b + q * ldb + c));
      __builtin_prefetch(b + (Ranks + q) * ldb + c, 0, 2);
    }
    UNROLL
    for (int r = 0; r < Rows; r++) {
      Vec sums = load(out + r * ldo + c);
      UNROLL
      for (int q = 0; q < Ranks; q++) sums += weights[r][q] * factors[q];
      store(out + r * ldo + c, sums);
    }
  }
  for (; c < width; c++)
    for (int r = 0; r < Rows; r++)
      for (int q = 0; q < Ranks; q++)
        out[r * ldo + c] += to_float(shrunk[r * rank + q]) * to_float(b[q * ldb + c]);
}

#if defined(__AVX512BF16__) && defined(__AVX512F__)

// The pairs of two neighbouring ranks of b at 2 * kLanes outputs, a half of them in each vector.
inline void pair_ranks(const __m512i one, const __m512i other, __m512i* pairs) {
  alignas(64) static constexpr int16_t kFirst[] = {
      0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_load_si512(kFirst);
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(kLanes));
  pairs[0] = held(_mm512_permutex2var_epi16(one, first, other));
  pairs[1] = held(_mm512_permutex2var_epi16(one, second, other));
}

// The same in pairs of ranks.
template <int Rows, int Vecs, typename Factor>
void expand_tile(const BFloat16* shrunk, int64_t rank, const Factor* b, int64_t ldb, int64_t ranks,
                 float* out, int64_t ldo) {
  static_assert(Vecs % 2 == 0, "factors are read two vectors at a time");
  Vec sums[Rows][Vecs];
  begin_sums(false, out, ldo, sums);
  // The second of the last pair may be another projection's rank, or none.
  const auto add = [&](auto alone, int64_t q) __attribute__((always_inline)) {
    using Pair = std::conditional_t<alone(), uint16_t, uint32_t>;
    const Factor* one = b + q * ldb;
    const Factor* other = one + ldb;
    __builtin_prefetch(one + Vecs * kLanes);
    if (!alone()) __builtin_prefetch(other + Vecs * kLanes);
    __m512i factors[Vecs];
    UNROLL
    for (int v = 0; v < Vecs; v += 2)
      pair_ranks(_mm512_loadu_si512(one + v * kLanes),
                 alone() ? __m512i{} : _mm512_loadu_si512(other + v * kLanes), factors + v);
    UNROLL
    for (int r = 0; r < Rows; r++) {
      Pair pair;
      std::memcpy(&pair, shrunk + r * rank + q, sizeof pair);
      const __m512i weights = held(_mm512_set1_epi32(static_cast<int>(pair)));
      UNROLL
      for (int v = 0; v < Vecs; v++)
        sums[r][v] = (Vec)_mm512_dpbf16_ps((__m512)sums[r][v], (__m512bh)factors[v],
                                           (__m512bh)weights);
    }
  };
  int64_t q = 0;
  for (; q + 2 <= ranks; q += 2) add(std::false_type{}, q);
  if (q < ranks) add(std::true_type{}, q);
  end_sums(sums, out, ldo);
}

#else

// Never called.
template <typename Factor, int Rows, int Ranks>
int64_t add_products(const int16_t*, int64_t, const Factor*, int64_t in, Vec (&)[Rows][Ranks]) {
  return in;
}
template <int Rows, int Vecs, typename Factor>
void expand_tile(const BFloat16*, int64_t, const Factor*, int64_t, int64_t, float*, int64_t) {}

#endif

}  // namespace dynamic_lora
