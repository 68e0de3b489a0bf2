// Low-rank deltas that are added panel by panel of a product, while its sums are at hand, or, where
// each of several adapters has few rows and waiting for factors is what takes time, once a product
// is done. Both add a row's ranks in the same order to the same sums.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "byte_factors.h"
#include "segments.h"
#include "team.h"

namespace dynamic_lora {

constexpr int kRowsAlong = kLanes == 16 ? 4 : 2;  // with kRanksAlong, what registers hold of them
constexpr int kRanksAlong = 4;
constexpr int64_t kOutsAlong = 768;  // outputs of a part that one thread expands to at a time

// Neighbouring ranks of a segment that reach the same outputs.
struct Part {
  Factors kind;
  const void* b;       // [ranks, out]
  const void* shrunk;  // [rows, rank], from the first of these ranks on
  int64_t ldb, rank, ranks, row, rows, from, to;
};

// Appends the parts of a segment, in pieces of up to `most` outputs.
inline void part_segment(const Segment& s, int64_t most, std::vector<Part>& parts) {
  const auto add = [&](auto kind, int64_t first, int64_t last, int64_t from, int64_t to) {
    using Factor = typename FactorTypes<kind()>::Factor;
    for (; from < to; from += most)
      parts.push_back({kind(), static_cast<const Factor*>(s.b) + first * s.ldb,
                       s.shrunk_to<kind()>(first), s.ldb, s.rank, last - first, s.row, s.rows,
                       from, std::min(from + most, to)});
  };
  for (int64_t first = 0, last; first < s.rank; first = last) {
    const int64_t from = s.columns[first * 2], to = s.columns[first * 2 + 1];
    for (last = first + 1; last < s.rank; last++)
      if (s.columns[last * 2] != from || s.columns[last * 2 + 1] != to) break;
    with_kind(s.kind, [&](auto kind) { add(kind, first, last, from, to); });
  }
}

template <Factors kind>
void expand_part(const Part& part, float* out, int64_t ldo) {
  using Types = FactorTypes<kind>;
  const auto* b = static_cast<const typename Types::Factor*>(part.b) + part.from;
  const auto* shrunk = static_cast<const typename Types::Shrunk*>(part.shrunk);
  const RowBlocks rows(part.rows, kRowsAlong), ranks(part.ranks, kRanksAlong);
  for (int64_t i = 0; i < ranks.count; i++)
    for (int64_t j = 0; j < rows.count; j++) {
      const int64_t q = ranks.first(i), r = rows.first(j);
      with_rows<kRanksAlong>(ranks.first(i + 1) - q, [&](auto num_ranks) {
        with_rows<kRowsAlong>(rows.first(j + 1) - r, [&](auto num_rows) {
          expand_along<num_rows(), num_ranks()>(
              shrunk + r * part.rank + q, part.rank, b + q * part.ldb, part.ldb,
              out + (part.row + r) * ldo + part.from, ldo, part.to - part.from);
        });
      });
    }
}

// Adds the deltas of all parts, no two of which share an output, to out [rows, ldo]. Called by a
// whole team of threads.
inline void share_expanding(const std::vector<Part>& parts, float* out, int64_t ldo) {
#pragma omp for schedule(guided, 1) nowait
  for (size_t i = 0; i < parts.size(); i++)
    with_kind(parts[i].kind, [&](auto kind) { expand_part<kind()>(parts[i], out, ldo); });
  meet();
}

// Adds a part to the outputs [rows, kWidth] of a panel, from `column` on, of which there are `width`;
// to rows of the part from its own `first` on.
template <Factors kind>
void add_to_panel(const Part& part, int64_t first, int64_t rows, int64_t column, int64_t width,
                  float* sums) {
  using Types = FactorTypes<kind>;
  const auto* b = static_cast<const typename Types::Factor*>(part.b) + column;
  const auto* shrunk = static_cast<const typename Types::Shrunk*>(part.shrunk) + first * part.rank;
  if (part.from <= column && part.to >= column + kWidth) {
    const RowBlocks blocks(rows, kTileRows);
    for (int64_t i = 0; i < blocks.count; i++) {
      const int64_t row = blocks.first(i);
      with_rows<kTileRows>(blocks.first(i + 1) - row, [&](auto count) {
        expand_tile<count(), kPanelVecs>(shrunk + row * part.rank, part.rank, b, part.ldb,
                                         part.ranks, sums + row * kWidth, kWidth);
      });
    }
    return;
  }
  const int64_t from = std::max<int64_t>(part.from - column, 0);
  const int64_t to = std::min(part.to - column, width);
  for (int64_t r = 0; r < rows; r++)
    for (int64_t q = 0; q < part.ranks; q++)
      for (int64_t c = from; c < to; c++)
        sums[r * kWidth + c] += to_float(shrunk[r * part.rank + q]) * to_float(b[q * part.ldb + c]);
}

inline void add_to_panel(const Part& part, int64_t first, int64_t rows, int64_t column,
                         int64_t width, float* sums) {
  with_kind(part.kind, [&](auto kind) {
    add_to_panel<kind()>(part, first, rows, column, width, sums);
  });
}

// A part of factors in eight bits.
struct BytePart : TilePart<ByteTiles> {
  int64_t row, rows;
};

inline void add_to_panel(const BytePart& part, int64_t first, int64_t rows, int64_t column,
                         int64_t width, float* sums) {
  expand_bytes(part, first, rows, std::max(column, part.from), std::min(column + width, part.to),
               sums - column, kWidth);
}

// The expanding of all parts, panel by panel.
template <typename Part>
class PanelDeltas {
 public:
  // `parts` by ascending row. Where `memory` runs out, some are not added.
  PanelDeltas(const std::vector<Part>& parts, Memory& memory) : parts_(&parts), memory_(&memory) {}

  void begin(int64_t column, int64_t width) {
    column_ = column, width_ = width, done_ = 0;
    here_.clear();
    memory_->suffices([&] {
      for (const Part& part : *parts_) {
        if (part.from >= column + width || part.to <= column) continue;
        here_.push_back(&part);
      }
    });
  }

  void add(float* sums, int64_t row, int64_t rows) {
    for (size_t i = done_; i < here_.size() && here_[i]->row < row + rows; i++) {
      const Part& part = *here_[i];
      const int64_t first = std::max(row, part.row);
      const int64_t last = std::min(row + rows, part.row + part.rows);
      if (first < last)
        add_to_panel(part, first - part.row, last - first, column_, width_,
                     sums + (first - row) * kWidth);
      else if (i == done_ && part.row + part.rows <= row)
        done_++;
    }
  }

 private:
  const std::vector<Part>* parts_;
  Memory* memory_;
  int64_t column_ = 0, width_ = 0;
  size_t done_ = 0;
  std::vector<const Part*> here_;
};

}  // namespace dynamic_lora
