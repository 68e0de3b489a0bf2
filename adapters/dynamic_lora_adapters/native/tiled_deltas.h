// Low-rank deltas of rows sorted by adapter, from factors that are laid out in tiles: what is the
// same for all kinds of tiles. What one thread reads of a table is one stream.
//
// A kind of tiles says which numbers they hold (`Factor`) and what rows are shrunk to (`Shrunk`), how
// many ranks a tile has (kRanks), whether those of them that reach other outputs are parts of their own
// (kParted, with rows of their own that these are shrunk to), where else what a part's rows are shrunk to
// lies (`place`), how wide a rank is in a (`inputs`), and how it shrinks and expands: objects of
// `Shrinking` and `Expanding`, of which each thread has its own.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "rounded.h"
#include "team.h"
#include "walk.h"

namespace dynamic_lora {

constexpr int64_t kTileOuts = 16;   // outputs that lie side by side in all kinds of tiles
constexpr int64_t kTileChunk = 64;  // rows that one thread expands at a time, at most

inline int64_t tiled_outs(int64_t outs) { return (outs + kTileOuts - 1) / kTileOuts * kTileOuts; }

// Neighbouring rows of one adapter, and its factors.
template <typename Tiles>
struct TiledSegment {
  const typename Tiles::Factor* a;
  const typename Tiles::Factor* b;
  const int64_t* columns;          // [rank, 2]: where a rank of b is not zero; null: anywhere
  typename Tiles::Shrunk* shrunk;  // what is kept between the two products
  int64_t rank, row, rows;
  float sign;
  int64_t first_part, last_part;
};

// Ranks [first, last) of a tile, and the whole tiles of outputs that some of them reach.
template <typename Tiles>
struct TilePart {
  const typename Tiles::Factor* b;  // of the tile
  typename Tiles::Shrunk* shrunk;   // [rows, stride]
  int64_t stride, from, to;
  int64_t first, last;
};

// The deltas of one projection.
template <typename Tiles>
class TiledDeltas {
 public:
  std::vector<TiledSegment<Tiles>> segments;
  std::vector<TilePart<Tiles>> parts;
  bool undoes = false;  // whether some rows have two, one of which is taken away

  bool empty() const { return segments.empty(); }

  void clear() {
    segments.clear();
    parts.clear();
    undoes = false;
  }

  // Where parts are shrunk to rows of their own: how many these are,
  int64_t shrunk_rows() const {
    int64_t rows = 0;
    for (const TiledSegment<Tiles>& s : segments) rows += s.rows * (s.last_part - s.first_part);
    return rows;
  }

  // and, once there is room, where they lie.
  void place_shrunk(typename Tiles::Shrunk* at) {
    for (const TiledSegment<Tiles>& s : segments)
      for (int64_t i = s.first_part; i < s.last_part; i++, at += s.rows) parts[i].shrunk = at;
  }

  // Adds a segment, for so many outputs.
  void add(TiledSegment<Tiles> s, int64_t outs) {
    undoes |= s.sign < 0;
    s.first_part = static_cast<int64_t>(parts.size());
    for (int64_t q = 0; q < s.rank; q += Tiles::kRanks)
      for (int64_t first = q, last; first < q + Tiles::kRanks; first = last) {
        last = end_of_part(s, q, first);
        add_part(s, q, first, last, outs);
      }
    s.last_part = static_cast<int64_t>(parts.size());
    segments.push_back(s);
  }

 private:
  // Where the part of a tile of ranks, from `q` on, that begins at rank `first` ends.
  static int64_t end_of_part(const TiledSegment<Tiles>& s, int64_t q, int64_t first) {
    int64_t last = q + Tiles::kRanks;
    if (!Tiles::kParted || !s.columns) return last;
    for (last = first + 1; last < q + Tiles::kRanks; last++)
      if (!std::equal(s.columns + first * 2, s.columns + first * 2 + 2, s.columns + last * 2)) break;
    return last;
  }

  void add_part(const TiledSegment<Tiles>& s, int64_t q, int64_t first, int64_t last, int64_t outs) {
    int64_t from = s.columns ? outs : 0, to = s.columns ? 0 : outs;
    for (int64_t r = first; s.columns && r < last; r++) {
      if (s.columns[r * 2] == s.columns[r * 2 + 1]) continue;
      from = std::min(from, s.columns[r * 2]);
      to = std::max(to, s.columns[r * 2 + 1]);
    }
    if (from >= to) return;
    const auto [shrunk, stride] = Tiles::place(s, q);
    parts.push_back({s.b + q * tiled_outs(outs), shrunk, stride, from / kTileOuts * kTileOuts,
                     tiled_outs(to), first, last});
  }
};

// Shrinking is shared out by tiles of ranks, so that a is read once; by rows where these are many.
template <typename Tiles>
bool shrinks_by_rows(const TiledSegment<Tiles>& s) {
  return s.rows > Tiles::kBlock;
}

template <typename Tiles>
void shrink_tiled_item(const TiledDeltas<Tiles>& deltas, const TiledSegment<Tiles>& s, int64_t item,
                       typename Tiles::Shrinking& shrinking) {
  const TilePart<Tiles>* parts = deltas.parts.data();
  const auto shrink = [&](int64_t first, int64_t rows, int64_t rank) {
    shrinking.shrink(s, parts + s.first_part, parts + s.last_part, first, rows, rank);
  };
  if (!shrinks_by_rows(s)) return shrink(0, s.rows, item * Tiles::kRanks);
  const typename Tiles::Blocks blocks(s.rows, Tiles::kBlock);
  const int64_t first = blocks.first(item), last = blocks.first(item + 1);
  for (int64_t rank = 0; rank < s.rank; rank += Tiles::kRanks) shrink(first, last - first, rank);
}

// The shrinking of all segments, which is done for sure behind the next barrier, for rows [in] of
// which `copies` has what this kind of tiles reads. Called by a whole team of threads.
template <typename Tiles>
void share_tiled_shrinking(const TiledDeltas<Tiles>& deltas, const InputCopies& copies, int64_t in) {
  using Segment = TiledSegment<Tiles>;
  Walk walk(deltas.segments, [](const Segment& s) {
    return shrinks_by_rows(s) ? typename Tiles::Blocks(s.rows, Tiles::kBlock).count
                              : s.rank / Tiles::kRanks;
  });
  typename Tiles::Shrinking shrinking(copies, in);
#pragma omp for schedule(guided, 1) nowait
  for (int64_t item = 0; item < walk.items(); item++) {
    const auto [segment, own] = walk.find(item);
    shrink_tiled_item(deltas, *segment, own, shrinking);
  }
}

// What one thread expands to at a time.
struct TiledItem {
  int64_t first, last;  // of the segment's rows
  int64_t column, stop;

  TiledItem(int64_t rows, int64_t item, int64_t outs, int64_t strip) {
    const int64_t chunks = count_chunks(rows);
    first = item % chunks * kTileChunk, last = std::min(first + kTileChunk, rows);
    column = item / chunks * strip, stop = std::min(column + strip, outs);
  }

  static int64_t count_chunks(int64_t rows) { return (rows + kTileChunk - 1) / kTileChunk; }
};

// Adds what a segment gives for its rows [first, last) to outputs [column, stop).
template <typename Tiles>
void expand_tiled_rows(const TiledDeltas<Tiles>& deltas, const TiledSegment<Tiles>& s, int64_t first,
                       int64_t last, int64_t column, int64_t stop, float* out, int64_t ldo,
                       typename Tiles::Expanding& expanding) {
  const TilePart<Tiles>* parts = deltas.parts.data();
  for (int64_t row = first; row < last; row += Tiles::kExpanded)
    expanding.expand(parts + s.first_part, parts + s.last_part, row,
                     std::min(Tiles::kExpanded, last - row), column, stop,
                     out + (s.row + row) * ldo, ldo);
}

// Adds the deltas of all segments, once these are shrunk, to out [rows, outs], whose rows are ldo
// apart. Called by a whole team of threads.
template <typename Tiles>
void share_tiled_expanding(const TiledDeltas<Tiles>& deltas, float* out, int64_t ldo, int64_t outs) {
  using Segment = TiledSegment<Tiles>;
  const int64_t strips = (outs + Tiles::kStrip - 1) / Tiles::kStrip;
  for (const bool undone : {true, false}) {
    if (undone && !deltas.undoes) continue;
    // Of those that are taken away, as of the others, each row has one.
    Walk walk(deltas.segments, [=](const Segment& s) {
      return (s.sign < 0) == undone ? TiledItem::count_chunks(s.rows) * strips : 0;
    });
    typename Tiles::Expanding expanding;
#pragma omp for schedule(guided, 1) nowait
    for (int64_t item = 0; item < walk.items(); item++) {
      const auto [segment, own] = walk.find(item);
      const TiledItem at(segment->rows, own, outs, Tiles::kStrip);
      expand_tiled_rows(deltas, *segment, at.first, at.last, at.column, at.stop, out, ldo,
                        expanding);
    }
    meet();
  }
}

}  // namespace dynamic_lora
