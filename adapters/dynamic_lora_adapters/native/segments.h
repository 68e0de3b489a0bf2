// Low-rank deltas of rows sorted by adapter: out += (x A^T) B, segment by segment.
//
// Each table is read in order and, while rows are few, once. Nothing is padded
// and nothing is gathered. Blocks of B that are zero, because a projection's
// outputs do not read another projection's ranks, are not read at all.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "product_inputs.h"
#include "segment_tiles.h"
#include "team.h"
#include "vectors.h"
#include "walk.h"

namespace dynamic_lora {

constexpr int kSums = kLanes == 16 ? 24 : 12;  // fit into the registers beside what is summed
constexpr int kRows = 6;        // rows that are expanded together
constexpr int kFewVecs = 2;     // vectors of outputs that are expanded to together, for many rows
constexpr int kRanks = kLanes == 16 ? 4 : 2;   // ranks that one thread shrinks to at a time
constexpr int64_t kManyRows = 24;  // beyond so many rows of a segment its x leaves the first caches
constexpr int64_t kStrip = 64;  // outputs that one thread expands to at a time
constexpr int64_t kMostPacked = 64;  // ranks of a strip that are laid side by side for many rows

// Neighbouring rows of one adapter.
struct Segment {
  Factors kind;
  const void* a;           // [rank, in]
  const void* b;           // [rank, out]
  const int64_t* columns;  // [rank, 2]: where a row of b is not zero; null: anywhere
  void* shrunk;            // [rows, rank]: what is kept between the two products
  int64_t rank, row, rows, ldb;
  float sign;

  template <Factors kind>
  const typename FactorTypes<kind>::Factor* row_of_a(int64_t number, int64_t in) const {
    return static_cast<const typename FactorTypes<kind>::Factor*>(a) + number * in;
  }

  template <Factors kind>
  typename FactorTypes<kind>::Shrunk* shrunk_to(int64_t place) const {
    return static_cast<typename FactorTypes<kind>::Shrunk*>(shrunk) + place;
  }
};

// The input and the output that the segments are rows of.
struct Deltas {
  const float* x;
  float* out;
  int64_t ldx, ldo, in, outs;
  const int16_t* rounded;  // x in bfloat16, rows ldr apart, where factors are multiplied in pairs
  int64_t ldr;

  template <Factors kind>
  const typename FactorTypes<kind>::Input* row(int64_t number) const {
    if constexpr (kind == Factors::kPaired)
      return rounded + number * ldr;
    else
      return x + number * ldx;
  }

  template <Factors kind>
  int64_t stride() const {
    return kind == Factors::kPaired ? ldr : ldx;
  }
};

template <Factors kind>
using OfKind = std::integral_constant<Factors, kind>;

// Calls `act` with the kind as a type.
template <typename Act>
void with_kind(Factors kind, const Act& act) {
  switch (kind) {
    case Factors::kFloats: return act(OfKind<Factors::kFloats>{});
    case Factors::kBFloat16: return act(OfKind<Factors::kBFloat16>{});
    case Factors::kHalves: return act(OfKind<Factors::kHalves>{});
    case Factors::kPaired: return act(OfKind<Factors::kPaired>{});
  }
}

// Shrinks `count` rows of a segment, from `first` of its rows on, to ranks from `from` on.
template <Factors kind, int Rows, int Ranks>
void shrink_rows(const Deltas& d, const Segment& s, int64_t first, int64_t count, int64_t from) {
  if constexpr (Rows > 0) {
    if (count != Rows) return shrink_rows<kind, Rows - 1, Ranks>(d, s, first, count, from);
    shrink_tile<kind, Rows, Ranks>(d.row<kind>(s.row + first), d.stride<kind>(),
                                   s.row_of_a<kind>(from, d.in), d.in, s.sign, s.rank,
                                   s.shrunk_to<kind>(first * s.rank + from));
  }
}

// Rows are cut into blocks of nearly equal size: a remainder of one row would cost as much as four.
template <Factors kind, int Ranks>
void shrink(const Deltas& d, const Segment& s, int64_t from) {
  constexpr int kMost = kSums / Ranks;
  const RowBlocks blocks(s.rows, kMost);
  for (int64_t block = 0; block < blocks.count; block++) {
    const int64_t first = blocks.first(block);
    shrink_rows<kind, kMost, Ranks>(d, s, first, blocks.first(block + 1) - first, from);
  }
}

template <int Rows, typename Factor>
void expand_rows(int64_t rows, const Deltas& d, const Segment& s, const float* shrunk,
                 const Factor* b, int64_t ldb, int64_t ranks, float* out) {
  if constexpr (Rows > 0) {
    if (rows != Rows)
      return expand_rows<Rows - 1>(rows, d, s, shrunk, b, ldb, ranks, out);
    // The fewer the rows, the longer the run of neighbouring factors that is read at once.
    constexpr int kVecs = Rows > 3 ? kFewVecs : 2 * kFewVecs;
    for (int64_t column = 0; column < kStrip; column += kVecs * kLanes)
      expand_tile<Rows, kVecs>(shrunk, s.rank, b + column, ldb, ranks, out + column, d.ldo);
  }
}

// Adds ranks [first, last) of a segment to outputs [column, stop), a strip at most.
template <typename Factor>
void expand_strip(const Deltas& d, const Segment& s, int64_t first, int64_t last, int64_t column,
                  int64_t stop) {
  const Factor* b = static_cast<const Factor*>(s.b) + first * s.ldb + column;
  const float* weights = static_cast<const float*>(s.shrunk) + first;
  const int64_t ranks = last - first;
  const RowBlocks blocks(s.rows, kRows);
  float* out = d.out + s.row * d.ldo + column;
  if (stop - column < kStrip) {
    for (int64_t r = 0; r < s.rows; r++)
      for (int64_t q = 0; q < ranks; q++)
        for (int64_t c = 0; c < stop - column; c++)
          out[r * d.ldo + c] += weights[r * s.rank + q] * to_float(b[q * s.ldb + c]);
    return;
  }
  const auto expand_all = [&](const auto* factors, int64_t ldb) {
    for (int64_t block = 0; block < blocks.count; block++) {
      const int64_t r = blocks.first(block), count = blocks.first(block + 1) - r;
      expand_rows<kRows>(count, d, s, weights + r * s.rank, factors, ldb, ranks, out + r * d.ldo);
    }
  };
  if (blocks.count == 1 || ranks > kMostPacked) return expand_all(b, s.ldb);
  float packed[kMostPacked * kStrip];
  for (int64_t q = 0; q < ranks; q++)
    for (int64_t c = 0; c < kStrip; c += kLanes)
      store(packed + q * kStrip + c, load(b + q * s.ldb + c));
  expand_all(packed, kStrip);
}

// Neighbouring ranks that reach the same outputs are added together.
template <typename Factor>
void expand_segment(const Deltas& d, const Segment& s, int64_t column, int64_t stop) {
  if (!s.columns) return expand_strip<Factor>(d, s, 0, s.rank, column, stop);
  for (int64_t first = 0, last; first < s.rank; first = last) {
    const int64_t from = s.columns[first * 2], to = s.columns[first * 2 + 1];
    for (last = first + 1; last < s.rank; last++)
      if (s.columns[last * 2] != from || s.columns[last * 2 + 1] != to) break;
    if (std::max(column, from) < std::min(stop, to))
      expand_strip<Factor>(d, s, first, last, std::max(column, from), std::min(stop, to));
  }
}

// All ranks of a block of rows, whose x stays at hand meanwhile. Ranks behind the last kRanks go one
// by one, here as in `shrink_item`: a rank must be summed alike for all numbers of rows.
template <Factors kind>
void shrink_block(const Deltas& d, const Segment& s, int64_t block) {
  constexpr int kMost = kSums / kRanks;
  const RowBlocks blocks(s.rows, kMost);
  const int64_t first = blocks.first(block), count = blocks.first(block + 1) - first;
  int64_t rank = 0;
  for (; rank + kRanks <= s.rank; rank += kRanks)
    shrink_rows<kind, kMost, kRanks>(d, s, first, count, rank);
  for (; rank < s.rank; rank++) shrink_rows<kind, kMost, 1>(d, s, first, count, rank);
}

// Shrinking is shared out by ranks, so that a is read once; by rows where these are many.
inline bool by_rows(const Segment& s) { return s.rows > kManyRows; }

inline int64_t shrinking_items(const Segment& s) {
  constexpr int kBlock = kSums / kRanks;
  return by_rows(s) ? (s.rows + kBlock - 1) / kBlock : (s.rank + kRanks - 1) / kRanks;
}

template <Factors kind>
void shrink_item(const Deltas& d, const Segment& s, int64_t item) {
  if (by_rows(s)) return shrink_block<kind>(d, s, item);
  int64_t rank = item * kRanks;
  if (rank + kRanks <= s.rank) return shrink<kind, kRanks>(d, s, rank);
  for (; rank < s.rank; rank++) shrink<kind, 1>(d, s, rank);
}

// The shrinking of all segments, which is done for sure behind the next barrier. Called by a whole
// team of threads.
inline void share_shrinking(const Deltas& d, const std::vector<Segment>& segments) {
  Walk walk(segments, shrinking_items);
#pragma omp for schedule(guided, 1) nowait
  for (int64_t item = 0; item < walk.items(); item++) {
    const auto found = walk.find(item);
    with_kind(found.first->kind,
              [&](auto kind) { shrink_item<kind()>(d, *found.first, found.second); });
  }
}

// Adds the deltas of all segments, none of them in pairs. Called by a whole team of threads.
inline void share_deltas(const Deltas& d, const std::vector<Segment>& segments) {
  share_shrinking(d, segments);
  meet();
  const int64_t strips = (d.outs + kStrip - 1) / kStrip;
#pragma omp for schedule(guided, 1) nowait
  for (int64_t strip = 0; strip < strips; strip++)
    for (const Segment& segment : segments) {
      const int64_t column = strip * kStrip, stop = std::min(column + kStrip, d.outs);
      with_kind(segment.kind, [&](auto kind) {
        expand_segment<typename FactorTypes<kind()>::Factor>(d, segment, column, stop);
      });
    }
  meet();
}

}  // namespace dynamic_lora
