// Low-rank deltas of rows sorted by adapter, in float32: out += (x A^T) B, segment by segment.
//
// Each table is read in order and, while rows are few, once. Nothing is padded
// and nothing is gathered. Blocks of B that are zero, because a projection's
// outputs do not read another projection's ranks, are not read at all.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "product.h"
#include "vectors.h"

namespace dynamic_lora {

constexpr int kSums = 12;       // sums that fit into the registers beside what is summed
constexpr int kRows = 6;        // rows that are expanded together
constexpr int kFewVecs = 2;     // vectors of outputs that are expanded to together, for many rows
constexpr int kRanks = 2;       // ranks that one thread shrinks to at a time
constexpr int64_t kManyRows = 24;  // beyond so many rows of a segment its x leaves the first caches
constexpr int64_t kStrip = 64;  // outputs that one thread expands to at a time
constexpr int64_t kMostPacked = 64;  // ranks of a strip that are laid side by side for many rows

// Neighbouring rows of one adapter.
struct Segment {
  const float* a;          // [rank, in]
  const float* b;          // [rank, out]
  const int64_t* columns;  // [rank, 2]: where a row of b is not zero; null: anywhere
  float* shrunk;           // [rows, rank]: what is kept between the two products
  int64_t rank, row, rows, ldb;
  float sign;
};

// The input and the output that the segments are rows of.
struct Deltas {
  const float* x;
  float* out;
  int64_t ldx, ldo, in, outs;
};

// Sums of [Rows, Ranks] products of rows of x and of a; asks for the next rows of a.
template <int Rows, int Ranks>
void shrink_tile(const Deltas& d, const Segment& s, const float* x, const float* a, float* shrunk) {
  const int64_t in = d.in, ldx = d.ldx;
  Vec sums[Rows][Ranks];
  UNROLL
  for (int r = 0; r < Rows; r++) {
    UNROLL
    for (int q = 0; q < Ranks; q++) sums[r][q] = Vec{};
  }
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
  UNROLL
  for (int r = 0; r < Rows; r++) {
    UNROLL
    for (int q = 0; q < Ranks; q++) {
      float total = sum(sums[r][q]);
      for (int64_t rest = i; rest < in; rest++) total += x[r * ldx + rest] * a[q * in + rest];
      shrunk[r * s.rank + q] = s.sign * total;
    }
  }
}

template <int Rows, int Ranks>
void shrink_rows(int64_t rows, const Deltas& d, const Segment& s, const float* x, const float* a,
                 float* shrunk) {
  if constexpr (Rows > 0) {
    if (rows == Rows)
      shrink_tile<Rows, Ranks>(d, s, x, a, shrunk);
    else
      shrink_rows<Rows - 1, Ranks>(rows, d, s, x, a, shrunk);
  }
}

// Rows are cut into blocks of nearly equal size: a remainder of one row would cost as much as four.
template <int Ranks>
void shrink(const Deltas& d, const Segment& s, const float* a, float* shrunk) {
  constexpr int kMost = kSums / Ranks;
  const float* x = d.x + s.row * d.ldx;
  const int64_t rows = s.rows, blocks = (rows + kMost - 1) / kMost;
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t r = rows * block / blocks, count = rows * (block + 1) / blocks - r;
    shrink_rows<kMost, Ranks>(count, d, s, x + r * d.ldx, a, shrunk + r * s.rank);
  }
}

// Adds ranks of b, whose rows are ldb apart, to [Rows, Vecs * kLanes] outputs.
template <int Rows, int Vecs>
void expand_tile(const float* shrunk, int64_t rank, const float* b, int64_t ldb, int64_t ranks,
                 float* out, int64_t ldo) {
  Vec sums[Rows][Vecs];
  UNROLL
  for (int r = 0; r < Rows; r++) {
    UNROLL
    for (int v = 0; v < Vecs; v++) sums[r][v] = load(out + r * ldo + v * kLanes);
  }
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
  UNROLL
  for (int r = 0; r < Rows; r++) {
    UNROLL
    for (int v = 0; v < Vecs; v++) store(out + r * ldo + v * kLanes, sums[r][v]);
  }
}

template <int Rows>
void expand_rows(int64_t rows, const Deltas& d, const Segment& s, const float* shrunk,
                 const float* b, int64_t ldb, int64_t ranks, float* out) {
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
inline void expand_strip(const Deltas& d, const Segment& s, int64_t first, int64_t last,
                         int64_t column, int64_t stop) {
  const float* b = s.b + first * s.ldb + column;
  const float* weights = s.shrunk + first;
  const int64_t ranks = last - first, blocks = (s.rows + kRows - 1) / kRows;
  float* out = d.out + s.row * d.ldo + column;
  if (stop - column < kStrip) {
    for (int64_t r = 0; r < s.rows; r++)
      for (int64_t q = 0; q < ranks; q++)
        for (int64_t c = 0; c < stop - column; c++)
          out[r * d.ldo + c] += weights[r * s.rank + q] * b[q * s.ldb + c];
    return;
  }
  int64_t ldb = s.ldb;
  float packed[kMostPacked * kStrip];
  if (blocks > 1 && ranks <= kMostPacked) {
    for (int64_t q = 0; q < ranks; q++)
      std::memcpy(packed + q * kStrip, b + q * s.ldb, kStrip * sizeof(float));
    b = packed, ldb = kStrip;
  }
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t r = s.rows * block / blocks, count = s.rows * (block + 1) / blocks - r;
    expand_rows<kRows>(count, d, s, weights + r * s.rank, b, ldb, ranks, out + r * d.ldo);
  }
}

// Neighbouring ranks that reach the same outputs are added together.
inline void expand_segment(const Deltas& d, const Segment& s, int64_t column, int64_t stop) {
  if (!s.columns) return expand_strip(d, s, 0, s.rank, column, stop);
  for (int64_t first = 0, last; first < s.rank; first = last) {
    const int64_t from = s.columns[first * 2], to = s.columns[first * 2 + 1];
    for (last = first + 1; last < s.rank; last++)
      if (s.columns[last * 2] != from || s.columns[last * 2 + 1] != to) break;
    if (std::max(column, from) < std::min(stop, to))
      expand_strip(d, s, first, last, std::max(column, from), std::min(stop, to));
  }
}

// All ranks of a block of rows, whose x stays at hand meanwhile.
inline void shrink_block(const Deltas& d, const Segment& s, int64_t block, int64_t blocks) {
  const int64_t row = s.rows * block / blocks, rows = s.rows * (block + 1) / blocks - row;
  const float* x = d.x + (s.row + row) * d.ldx;
  float* shrunk = s.shrunk + row * s.rank;
  int64_t rank = 0;
  for (; rank + kRanks <= s.rank; rank += kRanks)
    shrink_rows<kSums / kRanks, kRanks>(rows, d, s, x, s.a + rank * d.in, shrunk + rank);
  for (; rank < s.rank; rank++)
    shrink_rows<kSums / kRanks, 1>(rows, d, s, x, s.a + rank * d.in, shrunk + rank);
}

// Shrinking is shared out by ranks, so that a is read once; by rows where these are many.
inline bool by_rows(const Segment& s) { return s.rows > kManyRows; }

inline int64_t shrinking_items(const Segment& s) {
  constexpr int kBlock = kSums / kRanks;
  return by_rows(s) ? (s.rows + kBlock - 1) / kBlock : (s.rank + kRanks - 1) / kRanks;
}

inline void shrink_item(const Deltas& d, const Segment& s, int64_t item) {
  if (by_rows(s)) return shrink_block(d, s, item, shrinking_items(s));
  const int64_t rank = item * kRanks;
  if (rank + kRanks <= s.rank)
    shrink<kRanks>(d, s, s.a + rank * d.in, s.shrunk + rank);
  else
    shrink<1>(d, s, s.a + rank * d.in, s.shrunk + rank);
}

// The shrinking of all segments. Called by a whole team of threads.
inline void share_shrinking(const Deltas& d, const Segment* segments, int64_t count) {
  int64_t items = 0;
  for (int64_t i = 0; i < count; i++) items += shrinking_items(segments[i]);
  const Segment* s = segments;
  int64_t start = 0;  // the first of this segment's items
#pragma omp for schedule(guided, 1)
  for (int64_t item = 0; item < items; item++) {
    if (item < start) s = segments, start = 0;
    for (int64_t own; item - start >= (own = shrinking_items(*s)); s++) start += own;
    shrink_item(d, *s, item - start);
  }
}

// Adds the deltas of all segments. Called by a whole team of threads.
inline void share_deltas(const Deltas& d, const Segment* segments, int64_t count) {
  share_shrinking(d, segments, count);
  const int64_t strips = (d.outs + kStrip - 1) / kStrip;
#pragma omp for schedule(guided, 1)
  for (int64_t strip = 0; strip < strips; strip++)
    for (int64_t i = 0; i < count; i++)
      expand_segment(d, segments[i], strip * kStrip, std::min(strip * kStrip + kStrip, d.outs));
}

// Neighbouring ranks of a segment that reach the same outputs.
struct Part {
  const float* b;       // [ranks, out]
  const float* shrunk;  // [rows, rank], from the first of these ranks on
  int64_t ldb, rank, ranks, row, rows, from, to;
};

inline void part_segment(const Segment& s, std::vector<Part>& parts) {
  for (int64_t first = 0, last; first < s.rank; first = last) {
    const int64_t from = s.columns[first * 2], to = s.columns[first * 2 + 1];
    for (last = first + 1; last < s.rank; last++)
      if (s.columns[last * 2] != from || s.columns[last * 2 + 1] != to) break;
    if (from < to)
      parts.push_back({s.b + first * s.ldb, s.shrunk + first, s.ldb, s.rank, last - first, s.row,
                       s.rows, from, to});
  }
}

// The expanding of all parts, panel by panel of a product, while its sums are at hand.
class PanelDeltas {
 public:
  // `parts` by ascending row.
  PanelDeltas(const Part* parts, int64_t count) : parts_(parts), count_(count) {}

  void begin(int64_t column, int64_t width) {
    column_ = column, width_ = width, done_ = 0;
    here_.clear();
    for (int64_t i = 0; i < count_; i++) {
      const Part& part = parts_[i];
      if (part.from >= column + width || part.to <= column) continue;
      here_.push_back(&part);
    }
  }

  void add(float* sums, int64_t row, int64_t rows) {
    for (size_t i = done_; i < here_.size() && here_[i]->row < row + rows; i++) {
      const Part& part = *here_[i];
      const int64_t first = std::max(row, part.row);
      const int64_t last = std::min(row + rows, part.row + part.rows);
      if (first < last)
        add_part(part, part.shrunk + (first - part.row) * part.rank, last - first,
                 sums + (first - row) * kWidth);
      else if (i == done_ && part.row + part.rows <= row)
        done_++;
    }
  }

 private:
  void add_part(const Part& part, const float* shrunk, int64_t rows, float* sums) const {
    const float* b = part.b + column_;
    if (part.from <= column_ && part.to >= column_ + kWidth) {
      add_rows<kTileRows>(rows, part, shrunk, b, sums);
      return;
    }
    const int64_t from = std::max<int64_t>(part.from - column_, 0);
    const int64_t to = std::min(part.to - column_, width_);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t q = 0; q < part.ranks; q++)
        for (int64_t c = from; c < to; c++)
          sums[r * kWidth + c] += shrunk[r * part.rank + q] * b[q * part.ldb + c];
  }

  template <int Rows>
  void add_rows(int64_t rows, const Part& part, const float* shrunk, const float* b,
                float* sums) const {
    if constexpr (Rows > 0) {
      if (rows != Rows) return add_rows<Rows - 1>(rows, part, shrunk, b, sums);
      expand_tile<Rows, kPanelVecs>(shrunk, part.rank, b, part.ldb, part.ranks, sums, kWidth);
    }
  }

  const Part* parts_;
  int64_t count_, column_ = 0, width_ = 0;
  size_t done_ = 0;
  std::vector<const Part*> here_;
};

}  // namespace dynamic_lora
