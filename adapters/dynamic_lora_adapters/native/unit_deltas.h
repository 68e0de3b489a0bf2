// Low-rank deltas on a processor's matrix unit, for factors in bfloat16.
//
// Shrinking multiplies rows of A, as they lie, by inputs that are laid out as a panel of weights
// is; it gives what inputs are shrunk to with ranks and rows exchanged. Expanding multiplies that
// by ranks of B in pairs, which are put together for 32 outputs at a time.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "matrix_unit.h"
#include "segments.h"

namespace dynamic_lora {

constexpr int64_t kUnitOuts = 2 * kUnitRows;  // outputs, or rows of inputs, of a panel
constexpr int64_t kRowsShrunk = 64;           // rows that one thread shrinks together
constexpr int64_t kMostPairs = 64;            // ranks of a panel that are laid in pairs at a time

// Ranks of a part with the zeros behind them, which make up whole tiles.
inline int64_t padded_ranks(int64_t ranks) {
  return (ranks + kUnitDepth - 1) / kUnitDepth * kUnitDepth;
}

// Elements that a segment may need for what it is shrunk to, whatever its parts are.
inline int64_t most_shrunk(int64_t rank, int64_t rows) {
  return (rows + kUnitBlock) * (rank / kRankGroup + 1) * kUnitDepth;
}

// Inputs in bfloat16, in panels [rows / kUnitOuts][in / 2][kUnitOuts][2].
struct InputPanels {
  Lines<Brain> values;

  void make_room(int64_t rows, int64_t in) {
    have_room(values, (rows + kUnitOuts - 1) / kUnitOuts * kUnitOuts * in);
  }
};

// Appends a segment's groups of ranks; returns how many elements a row of what is shrunk has.
inline int64_t find_groups(const Segment& s, std::vector<RankGroup>& groups) {
  int64_t place = 0;
  with_parts(s, [&](int64_t first, int64_t last, int64_t from, int64_t to) {
    for (int64_t q = first; q < last; q += kRankGroup)
      groups.push_back({from < to ? place + q - first : -1, 0});
    if (from >= to) return;
    groups.back().zeros = padded_ranks(last - first) - (last - first);
    place += padded_ranks(last - first);
  });
  return place;
}

// Whether a segment's inputs, ranks and outputs make up whole tiles and groups.
inline bool suits_unit(const Segment& s, int64_t in) {
  bool suits = in % kUnitDepth == 0;
  with_parts(s, [&](int64_t first, int64_t last, int64_t from, int64_t to) {
    suits &= (last - first) % kRankGroup == 0 && from % kUnitOuts == 0 && to % kUnitOuts == 0;
  });
  return suits;
}

#if DYNAMIC_LORA_MATRIX_UNIT

// Exchanges the rows and columns of 16 vectors of 16.
inline void transpose(__m512i (&v)[16]) {
  __m512i t[16];
  UNROLL
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  UNROLL
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  UNROLL
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 8] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  UNROLL
  for (int i = 0; i < 4; i++) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd);
    v[i + 4] = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88);
    v[i + 12] = _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd);
  }
}

// Lays x [rows, in] out in panels; in is a multiple of kUnitDepth. Called by a whole team.
inline void share_panels(const float* x, int64_t rows, int64_t in, InputPanels& out) {
  const int64_t depths = in / kUnitDepth, halves = (rows + kUnitRows - 1) / kUnitRows;
#pragma omp for schedule(static)
  for (int64_t item = 0; item < halves * depths; item++) {
    const int64_t half = item / depths, first = half * kUnitRows;
    const int64_t i = item % depths * kUnitDepth;
    __m512i pairs[16];
    UNROLL
    for (int r = 0; r < 16; r++) {
      // Rows behind the last are of no account.
      const float* from = x + std::min(first + r, rows - 1) * in + i;
      pairs[r] = (__m512i)_mm512_cvtne2ps_pbh((__m512)load(from + kLanes), (__m512)load(from));
    }
    transpose(pairs);
    Brain* to = out.values.data() + half / 2 * kUnitOuts * in + i * kUnitOuts + half % 2 * kUnitDepth;
    UNROLL
    for (int p = 0; p < 16; p++) _mm512_store_si512(to + p * 2 * kUnitOuts, pairs[p]);
  }
}

// Puts down what up to 16 rows are shrunk to in one or two groups of ranks, from sums
// [2 * kRankGroup, kUnitOuts].
inline void put_ranks(const float* sums, int64_t rows, float sign, const RankGroup* groups,
                      int64_t count, Brain* shrunk, int64_t lds) {
  __m512i values[16];
  UNROLL
  for (int q = 0; q < 16; q++) values[q] = _mm512_loadu_si512(sums + q * kUnitOuts);
  transpose(values);
  for (int64_t r = 0; r < rows; r++) {
    const Vec value = sign * reinterpret_cast<const Vec&>(values[r]);
    const __m256i brains = (__m256i)_mm512_cvtneps_pbh((__m512)value);
    for (int64_t g = 0; g < count; g++) {
      if (groups[g].place < 0) continue;
      Brain* to = shrunk + r * lds + groups[g].place;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                       g ? _mm256_extracti128_si256(brains, 1) : _mm256_castsi256_si128(brains));
      if (groups[g].zeros) std::memset(to + kRankGroup, 0, groups[g].zeros * sizeof(Brain));
    }
  }
}

// Shrinks rows [first, last) of a segment to ranks [rank, rank + kUnitRows).
inline void unit_shrink(const InputPanels& inputs, int64_t in, const Segment& s, int64_t first,
                        int64_t last, int64_t rank) {
  static thread_local Lines<Brain> whole;
  const int64_t ranks = std::min(kUnitRows, s.rank - rank);
  const Brain* a = static_cast<const Brain*>(s.a) + rank * in;
  const auto* ahead = reinterpret_cast<const char*>(a + ranks * in);
  if (ranks < kUnitRows) {
    // A whole tile is read, and what is behind the last rank may be nobody's.
    have_room(whole, kUnitRows * in);
    std::memcpy(whole.data(), a, ranks * in * sizeof(Brain));
    a = whole.data();
  }
  alignas(64) float sums[(kUnitRows + 1) * kUnitOuts];
  for (int64_t row = first; row < last;) {
    const int64_t panel = (s.row + row) / kUnitOuts, begin = panel * kUnitOuts - s.row;
    const int64_t stop = std::min(last, begin + kUnitOuts);
    unit_tile(reinterpret_cast<const int16_t*>(a), in, ranks,
              inputs.values.data() + panel * kUnitOuts * in, in, sums, ahead,
              row == first ? kUnitRows * kLineBytes : 0);
    written();
    for (; row < stop; row += kUnitRows)
      put_ranks(sums + row - begin, std::min(kUnitRows, stop - row), s.sign,
                s.groups + rank / kRankGroup, ranks / kRankGroup,
                static_cast<Brain*>(s.shrunk) + row * s.lds, s.lds);
    row = stop;
  }
}

// The shrinking of all segments that are for the unit; it is done for sure behind the next
// barrier. Called by a whole team of threads.
inline void share_unit_shrinking(const InputPanels& inputs, int64_t in, const Segment* segments,
                                 int64_t count) {
  const MatrixUnit unit;
  const auto blocks = [](const Segment& s) { return (s.rows + kRowsShrunk - 1) / kRowsShrunk; };
  const auto items_of = [&](const Segment& s) {
    return s.kind == Factors::kOnUnit ? (s.rank + kUnitRows - 1) / kUnitRows * blocks(s) : 0;
  };
  int64_t items = 0;
  for (int64_t i = 0; i < count; i++) items += items_of(segments[i]);
  const Segment* s = segments;
  int64_t start = 0;  // the first of this segment's items
#pragma omp for schedule(guided, 1) nowait
  for (int64_t item = 0; item < items; item++) {
    if (item < start) s = segments, start = 0;
    for (int64_t own; item - start >= (own = items_of(*s)); s++) start += own;
    const int64_t number = item - start, first = number % blocks(*s) * kRowsShrunk;
    unit_shrink(inputs, in, *s, first, std::min(first + kRowsShrunk, s->rows),
                number / blocks(*s) * kUnitRows);
  }
}

// Clears what goes on behind so many ranks to a whole tile.
inline void clear_pairs(Brain* pairs, int64_t ranks) {
  std::memset(pairs + ranks * kUnitOuts, 0,
              (padded_ranks(ranks) - ranks) * kUnitOuts * sizeof(Brain));
}

// Puts ranks of b [ranks, ldb] together in pairs [ranks / 2, kUnitOuts, 2] of kUnitOuts outputs.
inline void pair_outs(const Brain* b, int64_t ldb, int64_t ranks, Brain* pairs) {
  for (int64_t q = 0; q < ranks; q += 2) {
    __m512i both[2];
    pair_ranks(_mm512_loadu_si512(b + q * ldb), _mm512_loadu_si512(b + (q + 1) * ldb), both);
    _mm512_store_si512(pairs + q * kUnitOuts, both[0]);
    _mm512_store_si512(pairs + q * kUnitOuts + kUnitDepth, both[1]);
  }
}

// Adds what rows of shrunk [rows, lds] give with pairs [ranks / 2, kUnitOuts, 2] to out; both go
// on with zeros to whole tiles of ranks, and shrunk has whole tiles of rows.
inline void unit_expand(const Brain* shrunk, int64_t lds, const Brain* pairs, int64_t ranks,
                        float* out, int64_t ldo, int64_t rows) {
  alignas(64) float sums[kUnitBlock * kUnitOuts];
  for (int64_t row = 0; row < rows; row += kUnitBlock) {
    const int64_t count = std::min(kUnitBlock, rows - row);
    unit_tile(reinterpret_cast<const int16_t*>(shrunk + row * lds), lds, count, pairs,
              padded_ranks(ranks), sums, nullptr, 0);
    written();
    for (int64_t r = 0; r < count; r++) {
      float* to = out + (row + r) * ldo;
      UNROLL
      for (int c = 0; c < kUnitOuts; c += kLanes)
        store(to + c, load(to + c) + load(sums + r * kUnitOuts + c));
    }
  }
}

#else

// Never called.
inline void share_panels(const float*, int64_t, int64_t, InputPanels&) {}
inline void share_unit_shrinking(const InputPanels&, int64_t, const Segment*, int64_t) {}
inline void clear_pairs(Brain*, int64_t) {}
inline void pair_outs(const Brain*, int64_t, int64_t, Brain*) {}
inline void unit_expand(const Brain*, int64_t, const Brain*, int64_t, float*, int64_t, int64_t) {}

#endif

}  // namespace dynamic_lora
