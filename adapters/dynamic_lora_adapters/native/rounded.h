// Products of weights in eight bits and inputs in sixteen, in integers.
//
// Inputs are rounded to sixteen bits, with a scale for each kGroup of a row: that
// error is 2^-16 of the group's largest, far below the weights' own. Two
// neighbouring inputs times two weights make one sum of 32 bits per output, which a
// group cannot overflow (256 * 127 * 32767 < 2^31). One instruction multiplies twice as
// many as one in float32.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "room.h"
#include "vectors.h"

namespace dynamic_lora {

constexpr int64_t kGroup = 256;       // inputs that share a scale
constexpr float kNothing = 1e-30f;    // inputs of a group all below count as zeros
constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer

typedef int16_t PairVec __attribute__((vector_size(kLanes * 4), aligned(2), may_alias));

// Rows cut into blocks of nearly equal size, `most` at most.
struct RowBlocks {
  int64_t count, size, larger;  // the first `larger` blocks have a row more than `size`

  RowBlocks(int64_t rows, int64_t most)
      : count((rows + most - 1) / most), size(count ? rows / count : 0),
        larger(count ? rows % count : 0) {}

  int64_t first(int64_t block) const { return block * size + std::min(block, larger); }
};

inline int64_t even(int64_t k) { return (k + 1) / 2 * 2; }

// Elements from one row to the next, for rows of at least k: an odd number of cache lines, or a
// column of some rows would fall into one set of the first-level cache.
template <typename Element>
int64_t row_stride(int64_t k) {
  constexpr int64_t kLine = kLineBytes / sizeof(Element);
  return ((k + kLine - 1) / kLine | 1) * kLine;
}

// The same for rows of floats, and a quarter of a line more: rows that begin alike would all come to
// the ends of their lines together, and a tile of them would wait for as many lines at once.
inline int64_t spread_stride(int64_t k) {
  return row_stride<float>(k) + kLineBytes / sizeof(float) / 4;
}

// Inputs as a product reads them where it cannot as they are: in sixteen bits (where k is odd, a
// zero makes the last one a pair), or in float32, spread.
struct InputCopies {
  Lines<int16_t> values;  // [rows, row_stride]
  Lines<int8_t> bytes;    // in place of values, for the matrix unit and for inputs in eight bits
  Lines<float> scales;    // [rows, groups], of kGroup or kFewInputs
  Lines<float> starts;    // [rows]: of inputs in eight bits, what their sums begin with
  Lines<float> spread;    // [rows, spread_stride]

  static int64_t groups(int64_t k) { return (k + kGroup - 1) / kGroup; }

  void make_room(int64_t rows, int64_t k) {
    have_room(values, rows * row_stride<int16_t>(k));
    have_room(scales, rows * groups(k));
  }
};

// kLanes pairs of weights, widened.
inline PairVec pairs(const int8_t* p) {
#if defined(__AVX512BW__)
  return reinterpret_cast<PairVec>(
      _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return reinterpret_cast<PairVec>(
      _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  PairVec wide;
  UNROLL
  for (int i = 0; i < 2 * kLanes; i++) wide[i] = p[i];
  return wide;
#endif
}

// One pair of inputs in every lane.
inline PairVec every(const int16_t* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return held(reinterpret_cast<PairVec>(pair - IntVec{}));
}

// Adds both products of each pair.
inline IntVec dot(IntVec sums, PairVec weights, PairVec inputs) {
#if defined(__AVX512VNNI__)
  return reinterpret_cast<IntVec>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sums),
                                                      reinterpret_cast<__m512i>(weights),
                                                      reinterpret_cast<__m512i>(inputs)));
#elif defined(__AVX512BW__)
  return sums + reinterpret_cast<IntVec>(_mm512_madd_epi16(reinterpret_cast<__m512i>(weights),
                                                           reinterpret_cast<__m512i>(inputs)));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  // Apart from each other, GCC multiplies far ahead of the sums, for which registers do not suffice.
  IntVec products;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
      : "+x"(sums), "=&x"(products)
      : "x"(weights), "x"(inputs));
  return sums;
#else
  UNROLL
  for (int i = 0; i < kLanes; i++)
    sums[i] += weights[2 * i] * inputs[2 * i] + weights[2 * i + 1] * inputs[2 * i + 1];
  return sums;
#endif
}

// Adds integers, times the scale of their row, to sums.
template <int Rows, int Vecs>
inline void scale_sums(const IntVec (&integers)[Rows][Vecs], const float* scales, int64_t groups,
                       Vec (&sums)[Rows][Vecs]) {
  UNROLL
  for (int r = 0; r < Rows; r++) {
    const Vec scale = all(scales[r * groups]);
    UNROLL
    for (int v = 0; v < Vecs; v++)
      sums[r][v] = fused(__builtin_convertvector(integers[r][v], Vec), scale, sums[r][v]);
  }
}

// Adds x [Rows, depth] of one group times a panel slice [depth, Vecs * kLanes] to y, or, where
// that is `fresh`, writes it there.
template <int Rows, int Vecs>
__attribute__((noinline)) void pair_tile(const int16_t* x, int64_t ldx, const float* scales,
                                         int64_t groups, const int8_t* panel, int64_t depth,
                                         bool fresh, float* y, int64_t ldy, Ahead ahead) {
  constexpr int kWide = Vecs * kLanes;
  const bool often = ahead.often();
  TileRows<Rows, int16_t> rows(x, ldx);
  IntVec sums[Rows][Vecs];
  UNROLL
  for (int r = 0; r < Rows; r++) {
    UNROLL
    for (int v = 0; v < Vecs; v++) sums[r][v] = IntVec{};
  }
  // Multiplies the pair of inputs behind so many pairs.
  const auto multiply = [&](int before) __attribute__((always_inline)) {
    PairVec weights[Vecs];
    UNROLL
    for (int v = 0; v < Vecs; v++) weights[v] = pairs(panel + (before * kWide + v * kLanes) * 2);
    UNROLL
    for (int r = 0; r < Rows; r++) {
      const PairVec inputs = every(rows.at(r) + 2 * before);
      UNROLL
      for (int v = 0; v < Vecs; v++) sums[r][v] = dot(sums[r][v], weights[v], inputs);
    }
    if (often) ahead.ask();
  };
  step_together(depth / 2, multiply, [&](int pairs) __attribute__((always_inline)) {
    rows.go_on(2 * pairs);
    panel = held(panel + pairs * kWide * 2);
    if (!often) ahead.ask_further(pairs);
  });
  Vec scaled[Rows][Vecs];
  begin_sums(fresh, y, ldy, scaled);
  scale_sums(sums, scales, groups, scaled);
  end_sums(scaled, y, ldy);
}

// The lower bits of each lane, stored to `out`. Spelt out for x86, where GCC moves them one by one.
inline void store_lower(IntVec whole, int8_t* out) {
#if defined(__AVX512F__)
  const __m128i lower = _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(whole));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), lower);
#elif defined(__AVX2__)
  const auto all = reinterpret_cast<__m256i>(whole);
  const __m256i firsts = _mm256_shuffle_epi8(all, _mm256_set1_epi32(0x0c080400));
  const __m256i both = _mm256_permutevar8x32_epi32(firsts, _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(both));
#else
  for (int i = 0; i < kLanes; i++) out[i] = static_cast<int8_t>(whole[i]);
#endif
}

inline void store_lower(IntVec whole, int16_t* out) {
#if defined(__AVX512F__)
  const __m256i lower = _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(whole));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), lower);
#elif defined(__AVX2__)
  const auto all = reinterpret_cast<__m256i>(whole);
  const __m256i order = _mm256_set1_epi64x(0x0d0c090805040100);
  const __m256i halves = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(all, order), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(halves));
#else
  for (int i = 0; i < kLanes; i++) out[i] = static_cast<int16_t>(whole[i]);
#endif
}

// Of a group of inputs that have been rounded: what they are multiples of, NaN if one of them was not
// finite, and their sum in those.
struct Rounded {
  float scale;
  int32_t total;
};

// Each lane and its neighbour, the first with the second and so on, added up in both.
inline Vec beside(Vec v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return v + reinterpret_cast<Vec>(_mm256_permute_ps(reinterpret_cast<__m256>(v), 0xb1));
#else
  Vec others;
  for (int i = 0; i < kLanes; i++) others[i] = v[i ^ 1];
  return v + others;
#endif
}

// Rounds x [count] of one row to as many bits as `Whole` has, and the rest of the last vector to
// zeros; in `Pairs` so that two neighbours together, rather than one alone, become its largest.
// Inlined, since callers know the number of most.
template <typename Whole, bool Pairs = false>
__attribute__((always_inline)) inline Rounded round_group(const float* x, int64_t count,
                                                          Whole* out) {
  constexpr float kLargest = std::numeric_limits<Whole>::max();
  constexpr int kUpper = 32 - 8 * sizeof(Whole);  // bits that are left out
  const auto for_each_vector = [&](const auto& act) __attribute__((always_inline)) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) act(i, load(x + i));
    if (i == count) return;
    Vec last{};
    std::memcpy(&last, x + i, (count - i) * sizeof(float));
    act(i, last);
  };
  Vec top{}, zero{};
  for_each_vector([&](int64_t, Vec value) __attribute__((always_inline)) {
    Vec size = value < Vec{} ? -value : value;
    if constexpr (Pairs) size = beside(size);
    top = size > top ? size : top;
    zero += value * 0.0f;
  });
  const float found = highest(top), largest = found > kNothing ? found : 0.0f;
  const float inverse = largest > 0 ? kLargest / largest : 0.0f;
  IntVec total{};
  for_each_vector([&](int64_t i, Vec value) __attribute__((always_inline)) {
    const IntVec whole = __builtin_convertvector((value * inverse + kMagic) - kMagic, IntVec);
    store_lower(whole, out + i);  // rows have room for whole vectors
    // Of what is no number this is anything, but no more than a byte or two.
    total += whole << kUpper >> kUpper;
  });
  return {largest / kLargest + sum(zero), sum(total)};
}

// Rounds row number `row`, x [k].
inline void round_row(const float* x, int64_t k, int64_t row, InputCopies& out) {
  int16_t* to = out.values.data() + row * row_stride<int16_t>(k);
  float* scales = out.scales.data() + row * InputCopies::groups(k);
  for (int64_t start = 0; start < k; start += kGroup)
    *scales++ = round_group(x + start, std::min(kGroup, k - start), to + start).scale;
}

}  // namespace dynamic_lora
