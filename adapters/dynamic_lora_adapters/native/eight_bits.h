// Products of weights and inputs both in eight bits, in integers.
//
// Inputs are rounded to eight bits, with a scale for each kFewInputs of a row: as llama.cpp's Q8_0
// has one for 32. Four neighbouring inputs times four weights make one sum of 32 bits per output.
// With VNNI one instruction does that, and multiplies twice as many as one for inputs in sixteen
// bits. With AVX2 alone one instruction makes sums of two products in sixteen bits, and another adds
// two of these: three for as many products as four otherwise. The sums fit if two inputs are at most
// 128 together; so it is they that share the eight bits.
//
// The instruction takes one of the two without a sign. Weights are kept with 128 added; the sums of a
// row begin with what that adds to them, taken away.

#pragma once

#include <cstdint>
#include <cstring>

#include "rounded.h"
#include "vectors.h"

namespace dynamic_lora {

constexpr int64_t kFewInputs = 64;  // that share a scale
constexpr int kAdded = 128;         // to a weight
// Sums that wait for each other: two of each keep the processor busy, where registers hold them.
constexpr int kFewSums = kLanes == 16 ? 8 : 4;
#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
constexpr bool kMultipliesFours = true;
#else
constexpr bool kMultipliesFours = false;
#endif
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(__AVXVNNI__)
constexpr bool kAddsTwos = true;  // two products in sixteen bits: (127 + 1) * 255 < 2^15
#else
constexpr bool kAddsTwos = false;
#endif
// Sums fit into 32 registers beside a group's. Of 16, those of a group take twelve, or eight where the
// instructions for two products need some as well.
constexpr int kFourRows = kLanes == 16 ? 7 : kAddsTwos ? 4 : 6;

// Inputs of a panel, in whole fours.
inline int64_t whole_fours(int64_t k) { return (k + 3) / 4 * 4; }

inline int64_t few_groups(int64_t k) { return (k + kFewInputs - 1) / kFewInputs; }

#if defined(__AVX512VNNI__) || (defined(__AVX2__) && !defined(__AVX512F__))

typedef int8_t Fours __attribute__((vector_size(kLanes * 4), aligned(1), may_alias));

inline Fours four_weights(const uint8_t* p) { return *reinterpret_cast<const Fours*>(p); }

// Four inputs in every lane.
inline Fours every_four(const int8_t* p) {
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  return held(reinterpret_cast<Fours>(four - IntVec{}));
}

// Adds the products of each four.
inline IntVec dot_fours(IntVec sums, Fours weights, Fours inputs) {
#if defined(__AVX512F__)
  return reinterpret_cast<IntVec>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sums),
                                                      reinterpret_cast<__m512i>(weights),
                                                      reinterpret_cast<__m512i>(inputs)));
#elif defined(__AVXVNNI__)
  return reinterpret_cast<IntVec>(_mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(sums),
                                                          reinterpret_cast<__m256i>(weights),
                                                          reinterpret_cast<__m256i>(inputs)));
#else
  const PairVec ones = held(PairVec{} + 1);
  IntVec products;  // one piece for the same reason as in `dot`
  asm("vpmaddubsw %3, %2, %1\n\tvpmaddwd %4, %1, %1\n\tvpaddd %1, %0, %0"
      : "+x"(sums), "=&x"(products)
      : "x"(weights), "x"(inputs), "x"(ones));
  return sums;
#endif
}

#else

// The first and third of each four, and the second and fourth, in sixteen bits.
struct Fours {
  PairVec odd, even;
};

inline Fours four_weights(const uint8_t* p) {
  typedef uint16_t Bits __attribute__((vector_size(kLanes * 4)));
  Bits both;
  std::memcpy(&both, p, sizeof both);
  return {reinterpret_cast<PairVec>(both & 0xff), reinterpret_cast<PairVec>(both >> 8)};
}

inline Fours every_four(const int8_t* p) {
  typedef int16_t Signed __attribute__((vector_size(kLanes * 4)));
  int32_t four;
  std::memcpy(&four, p, sizeof four);
  const auto both = reinterpret_cast<Signed>(four - IntVec{});
  return {held(reinterpret_cast<PairVec>(both << 8 >> 8)), held(reinterpret_cast<PairVec>(both >> 8))};
}

inline IntVec dot_fours(IntVec sums, const Fours& weights, const Fours& inputs) {
  return dot(dot(sums, weights.odd, inputs.odd), weights.even, inputs.even);
}

#endif

// Adds x [Rows, depth] times a panel [depth / 4, Vecs * kLanes, 4] to y [Rows, Vecs * kLanes], or,
// where that is `fresh`, writes it there. `ahead` goes on with each four inputs.
template <int Rows, int Vecs>
__attribute__((noinline)) void four_tile(const int8_t* x, int64_t ldx, const float* scales,
                                         const float* starts, int64_t groups, const uint8_t* panel,
                                         int64_t depth, bool fresh, float* y, Ahead ahead) {
  constexpr int kWide = Vecs * kLanes;
  constexpr int kChains = Rows * Vecs <= kFewSums ? 2 : 1;
  const bool often = ahead.often();
  TileRows<Rows, int8_t> rows(x, ldx);
  Vec sums[Rows][Vecs];
  begin_sums(fresh, y, kWide, sums);
  UNROLL
  for (int r = 0; r < Rows; r++) {
    UNROLL
    for (int v = 0; v < Vecs; v++) sums[r][v] += starts[r];
  }
  for (int64_t first = 0; first < depth; first += kFewInputs, scales++) {
    IntVec own[kChains][Rows][Vecs] = {};
    // Multiplies the four inputs behind so many fours.
    const auto multiply = [&](int fours) __attribute__((always_inline)) {
      Fours weights[Vecs];
      UNROLL
      for (int v = 0; v < Vecs; v++)
        weights[v] = four_weights(panel + (fours * kWide + v * kLanes) * 4);
      UNROLL
      for (int r = 0; r < Rows; r++) {
        const Fours inputs = every_four(rows.at(r) + 4 * fours);
        UNROLL
        for (int v = 0; v < Vecs; v++) {
          IntVec& sum = own[fours % kChains][r][v];
          sum = dot_fours(sum, weights[v], inputs);
        }
      }
      if (often) ahead.ask();
    };
    const auto go_on = [&](int fours) __attribute__((always_inline)) {
      rows.go_on(4 * fours);
      panel = held(panel + fours * kWide * 4);
      if (!often) ahead.ask_further(fours);
    };
    step_together(std::min(kFewInputs, depth - first) / 4, multiply, go_on);
    if constexpr (kChains == 2) {
      UNROLL
      for (int r = 0; r < Rows; r++) {
        UNROLL
        for (int v = 0; v < Vecs; v++) own[0][r][v] += own[1][r][v];
      }
    }
    scale_sums(own[0], scales, groups, sums);
  }
  end_sums(sums, y, kWide);
}

// Has room for rows [rows, k] in eight bits.
inline void make_eight_bit_room(int64_t rows, int64_t k, InputCopies& copies) {
  have_room(copies.bytes, rows * row_stride<int8_t>(k));
  have_room(copies.scales, rows * few_groups(k));
  have_room(copies.starts, rows);
}

// Rounds group number `group`, x [count], of row number `row`; groups come in their order.
inline void round_few(const float* x, int64_t k, int64_t row, int64_t group, int64_t count,
                      InputCopies& copies) {
  int8_t* to = copies.bytes.data() + row * row_stride<int8_t>(k) + group * kFewInputs;
  const Rounded rounded =
      count == kFewInputs ? round_group<int8_t, kAddsTwos>(x, kFewInputs, to)
                          : round_group<int8_t, kAddsTwos>(x, count, to);
  copies.scales[row * few_groups(k) + group] = rounded.scale;
  const float before = group == 0 ? 0.0f : copies.starts[row];
  copies.starts[row] = before - rounded.scale * static_cast<float>(kAdded * rounded.total);
}

// The same for what rounding it to row number `other` has left of it.
inline void round_rest(const float* x, int64_t k, int64_t other, int64_t row, int64_t group,
                       int64_t count, InputCopies& copies) {
  const int8_t* rounded =
      copies.bytes.data() + other * row_stride<int8_t>(k) + group * kFewInputs;
  const float scale = copies.scales[other * few_groups(k) + group];
  float rest[kFewInputs];
  for (int64_t i = 0; i < count; i++) rest[i] = x[i] - rounded[i] * scale;
  round_few(rest, k, row, group, count, copies);
}

// Rounds x [k] to row number `row` in eight bits, and what that leaves to row number `rest`, if that
// is not negative.
inline void round_row_to_eight_bits(const float* x, int64_t k, int64_t row, int64_t rest,
                                    InputCopies& copies) {
  for (int64_t group = 0; group < few_groups(k); group++) {
    const int64_t start = group * kFewInputs, count = std::min(kFewInputs, k - start);
    round_few(x + start, k, row, group, count, copies);
    if (rest >= 0) round_rest(x + start, k, row, rest, group, count, copies);
  }
}

}  // namespace dynamic_lora
