// Low-rank deltas on the matrix unit (Intel AMX), from factors in bfloat16 that are laid out for it.
//
// Deltas take as long as their factors take to come from memory. Rows of a plain table come from as
// many places at once as there are ranks; in tiles, what one thread reads is one stream:
//
//   a [rank / 8][in / 2][8][2]            b [rank / 8][outs / 16][4][16][2]
//
// with pairs of inputs side by side for eight ranks, and pairs of ranks for sixteen outputs. Behind
// the last input there are zeros up to a whole tile of 32, behind the last output to one of 16.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "matrix_unit.h"
#include "tiled_deltas.h"

namespace dynamic_lora {

constexpr int64_t kTileRanks = 8;
constexpr int64_t kAheadInA = 4096;  // bytes that factors are asked for ahead of being read
constexpr int64_t kAheadInB = 2048;

static_assert(kTileOuts == kUnitRows);

// How deltas of factors in these tiles are computed; on no other machine than one with the unit.
struct UnitTiles {
  using Factor = BFloat16;
  using Shrunk = BFloat16;
  using Blocks = WholeBlocks;
  using Segment = TiledSegment<UnitTiles>;
  using Part = TilePart<UnitTiles>;
  static constexpr int64_t kRanks = kTileRanks;
  static constexpr bool kParted = false;
  static constexpr int64_t kBlock = kUnitBlock;     // rows that are shrunk together
  static constexpr int64_t kExpanded = kUnitBlock;  // rows that are expanded together
  static constexpr int64_t kStrip = 384;            // outputs that one thread expands to at a time

  // Numbers that a rank of a takes.
  static int64_t inputs(int64_t in) { return (in + kUnitDepth - 1) / kUnitDepth * kUnitDepth; }

  // What rows are shrunk to is [rows, rank].
  static std::pair<Shrunk*, int64_t> place(const Segment& s, int64_t rank) {
    return {s.shrunk + rank, s.rank};
  }

  class Shrinking;
  class Expanding;
};

#if DYNAMIC_LORA_MATRIX_UNIT

// How the unit's tiles are cut for up to kUnitBlock rows: tiles of what has a row for each of
// those are as high as there are rows.
class UnitCut {
 public:
  enum Use { kShrinks, kExpands };

  explicit UnitCut(Use use) : use_(use) {}
  ~UnitCut() {
    if (rows_) _tile_release();
  }
  UnitCut(const UnitCut&) = delete;
  UnitCut& operator=(const UnitCut&) = delete;

  // Loading a cut takes as long as multiplying some tiles.
  void fit(int64_t rows) {
    if (rows == rows_) return;
    rows_ = rows;
    const int64_t upper = std::min(rows, kUnitRows);
    const int64_t lower = rows > kUnitRows ? rows - kUnitRows : upper;
    if (use_ == kShrinks)
      set({kSum, kSum, kSum, kSum, 64, 64, kSum, kSum},
          {upper, upper, lower, lower, upper, lower, kUnitDepth / 2, kUnitDepth / 2});
    else
      set({64, 64, 64, 64, kTileRanks * 2, kTileRanks * 2, 64, 64},
          {upper, lower, upper, lower, upper, lower, kTileRanks / 2, kTileRanks / 2});
  }

 private:
  static constexpr int64_t kSum = kTileRanks * sizeof(float);  // bytes, and those of pairs

  static void set(const int64_t (&bytes)[8], const int64_t (&rows)[8]) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } layout;
    for (int i = 0; i < 8; i++) {
      layout.row_bytes[i] = static_cast<uint16_t>(bytes[i]);
      layout.rows[i] = static_cast<uint8_t>(rows[i]);
    }
    written();
    _tile_loadconfig(&layout);
  }

  const Use use_;
  int64_t rows_ = 0;
};

// What a unit cut for shrinking sums up: in tiles 0 and 1 the upper rows, in 2 and 3 the lower ones
// or, where there are none, more of the upper ones, so that no sum waits for the one before it.
inline void sum_two_blocks(const int16_t* x, int64_t ldx, const BFloat16* a, int64_t depth) {
  const int64_t stride = ldx * sizeof(int16_t), line = kTileRanks * sizeof(float);
  const int16_t* lower = x + kUnitRows * ldx;
  int64_t i = 0;
  for (; i + 2 * kUnitDepth <= depth; i += 2 * kUnitDepth) {
    const BFloat16* factors = a + i * kTileRanks;
    ask_lines(reinterpret_cast<const char*>(factors) + kAheadInA, 2 * kUnitDepth * kTileRanks * 2);
    _tile_loadd(6, factors, line);
    _tile_loadd(7, factors + kUnitDepth * kTileRanks, line);
    _tile_loadd(4, x + i, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(4, x + i + kUnitDepth, stride);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, lower + i, stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_loadd(5, lower + i + kUnitDepth, stride);
    _tile_dpbf16ps(3, 5, 7);
  }
  if (i == depth) return;
  _tile_loadd(6, a + i * kTileRanks, line);
  _tile_loadd(4, x + i, stride);
  _tile_dpbf16ps(0, 4, 6);
  _tile_loadd(5, lower + i, stride);
  _tile_dpbf16ps(2, 5, 6);
}

inline void sum_one_block(const int16_t* x, int64_t ldx, const BFloat16* a, int64_t depth) {
  const int64_t stride = ldx * sizeof(int16_t), line = kTileRanks * sizeof(float);
  int64_t i = 0;
  for (; i + 4 * kUnitDepth <= depth; i += 4 * kUnitDepth) {
    const BFloat16* factors = a + i * kTileRanks;
    ask_lines(reinterpret_cast<const char*>(factors) + kAheadInA, 4 * kUnitDepth * kTileRanks * 2);
    _tile_loadd(6, factors, line);
    _tile_loadd(4, x + i, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, factors + kUnitDepth * kTileRanks, line);
    _tile_loadd(5, x + i + kUnitDepth, stride);
    _tile_dpbf16ps(1, 5, 7);
    _tile_loadd(6, factors + 2 * kUnitDepth * kTileRanks, line);
    _tile_loadd(4, x + i + 2 * kUnitDepth, stride);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(7, factors + 3 * kUnitDepth * kTileRanks, line);
    _tile_loadd(5, x + i + 3 * kUnitDepth, stride);
    _tile_dpbf16ps(3, 5, 7);
  }
  for (; i < depth; i += kUnitDepth) {
    _tile_loadd(6, a + i * kTileRanks, line);
    _tile_loadd(4, x + i, stride);
    _tile_dpbf16ps(0, 4, 6);
  }
}

// To shrunk [rows, rank], what x [rows, depth] gives with one tile of ranks, times `sign`; for up
// to kUnitBlock rows, which the unit is cut for.
inline void shrink_on_unit(const int16_t* x, int64_t ldx, int64_t rows, const BFloat16* a,
                           int64_t depth, float sign, BFloat16* shrunk, int64_t rank) {
  constexpr int64_t kLine = kTileRanks * sizeof(float);
  alignas(64) float sums[4][kUnitRows][kTileRanks];
  begin_unit();
  if (rows > kUnitRows)
    sum_two_blocks(x, ldx, a, depth);
  else
    sum_one_block(x, ldx, a, depth);
  _tile_stored(0, sums[0], kLine);
  _tile_stored(1, sums[1], kLine);
  _tile_stored(2, sums[2], kLine);
  _tile_stored(3, sums[3], kLine);
  written();
  for (int64_t r = 0; r < rows; r++) {
    const int64_t place = r % kUnitRows;
    const auto pair = [&](int64_t i) {
      return _mm256_add_ps(_mm256_load_ps(sums[i][place]), _mm256_load_ps(sums[i + 1][place]));
    };
    const __m256 sum = rows > kUnitRows ? pair(r / kUnitRows * 2) : _mm256_add_ps(pair(0), pair(2));
    const auto rounded = _mm256_cvtneps_pbh(_mm256_mul_ps(sum, _mm256_set1_ps(sign)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(shrunk + r * rank), (__m128i)rounded);
  }
}

// Adds what parts give for `rows` rows, from `row` on, to outputs [column, column + kTileOuts) at
// `out`, whose rows are ldo apart; for up to kUnitBlock rows, which the unit is cut for.
template <bool Both>
inline void expand_tile_on_unit(const UnitTiles::Part* part, const UnitTiles::Part* last,
                                int64_t row, int64_t column, float* out, int64_t ldo) {
  const int64_t stride = ldo * sizeof(float);
  float* lower = out + kUnitRows * ldo;
  bool begun = false;
  for (; part != last; part++) {
    if (column < part->from || column >= part->to) continue;
    if (!begun) {
      begun = true;
      _tile_loadd(0, out, stride);
      if (Both) _tile_loadd(1, lower, stride);
    }
    const BFloat16* factors = part->b + column * kTileRanks;
    const BFloat16* shrunk = part->shrunk + row * part->stride;
    ask_lines(reinterpret_cast<const char*>(factors) + kAheadInB, kTileRanks * kUnitBytes / 2);
    _tile_loadd(6, factors, kUnitBytes);
    _tile_loadd(4, shrunk, part->stride * sizeof(BFloat16));
    _tile_dpbf16ps(0, 4, 6);
    if (!Both) continue;
    _tile_loadd(5, shrunk + kUnitRows * part->stride, part->stride * sizeof(BFloat16));
    _tile_dpbf16ps(1, 5, 6);
  }
  if (!begun) return;
  _tile_stored(0, out, stride);
  if (Both) _tile_stored(1, lower, stride);
}

// The same for outputs [column, stop). The last tile may be one of fewer outputs: what is behind
// them is another row's, and another thread may write it.
template <bool Both>
void expand_on_unit(const UnitTiles::Part* first, const UnitTiles::Part* last, int64_t row,
                    int64_t rows, int64_t column, int64_t stop, float* out, int64_t ldo) {
  for (; column + kTileOuts <= stop; column += kTileOuts)
    expand_tile_on_unit<Both>(first, last, row, column, out + column, ldo);
  if (column == stop) return;
  alignas(64) float whole[kUnitBlock][kTileOuts] = {};
  const size_t bytes = (stop - column) * sizeof(float);
  for (int64_t r = 0; r < rows; r++) std::memcpy(whole[r], out + r * ldo + column, bytes);
  written();
  expand_tile_on_unit<Both>(first, last, row, column, whole[0], kTileOuts);
  written();
  for (int64_t r = 0; r < rows; r++) std::memcpy(out + r * ldo + column, whole[r], bytes);
}

// Reads inputs in bfloat16, as `round_row_to_bfloat16` lays them out.
class UnitTiles::Shrinking {
 public:
  Shrinking(const InputCopies& copies, int64_t in)
      : x_(copies.values.data()), ldx_(row_stride<int16_t>(in)), depth_(inputs(in)) {}

  // Shrinks rows [first, first + rows) of a segment to a tile of ranks.
  void shrink(const Segment& s, const Part*, const Part*, int64_t first, int64_t rows,
              int64_t rank) {
    cut_.fit(rows);
    shrink_on_unit(x_ + (s.row + first) * ldx_, ldx_, rows, s.a + rank * depth_, depth_, s.sign,
                   s.shrunk + first * s.rank + rank, s.rank);
  }

 private:
  const int16_t* x_;
  int64_t ldx_, depth_;
  UnitCut cut_{UnitCut::kShrinks};
};

class UnitTiles::Expanding {
 public:
  // Adds what parts give for `rows` rows, from `row` on, to outputs [column, stop) at `out`.
  void expand(const Part* first, const Part* last, int64_t row, int64_t rows, int64_t column,
              int64_t stop, float* out, int64_t ldo) {
    cut_.fit(rows);
    const auto expand = rows > kUnitRows ? expand_on_unit<true> : expand_on_unit<false>;
    expand(first, last, row, rows, column, stop, out, ldo);
  }

  // Has memory hold what was added.
  void finish() { written(); }

 private:
  UnitCut cut_{UnitCut::kExpands};
};

#else

// Never called.
class UnitTiles::Shrinking {
 public:
  Shrinking(const InputCopies&, int64_t) {}
  void shrink(const Segment&, const Part*, const Part*, int64_t, int64_t, int64_t) {}
};

class UnitTiles::Expanding {
 public:
  void expand(const Part*, const Part*, int64_t, int64_t, int64_t, int64_t, float*, int64_t) {}
  void finish() {}
};

#endif

// Does as `share_tiled_expanding`, for outputs of two halves, and rows each of which has one adapter's
// deltas: `act` is told of what is done of both, by (row, rows, column, stop) of the first.
template <typename Act>
void share_tiled_halves(const TiledDeltas<UnitTiles>& deltas, float* out, int64_t outs,
                        const Act& act) {
  using Segment = UnitTiles::Segment;
  constexpr int64_t kStrip = UnitTiles::kStrip / 2;
  const int64_t half = outs / 2, strips = (half + kStrip - 1) / kStrip;
  Walk walk(deltas.segments,
            [=](const Segment& s) { return TiledItem::count_chunks(s.rows) * strips; });
  UnitTiles::Expanding expanding;
#pragma omp for schedule(guided, 1) nowait
  for (int64_t item = 0; item < walk.items(); item++) {
    const auto [segment, own] = walk.find(item);
    const TiledItem at(segment->rows, own, half, kStrip);
    for (const int64_t from : {int64_t{0}, half})
      expand_tiled_rows(deltas, *segment, at.first, at.last, from + at.column, from + at.stop, out,
                        outs, expanding);
    expanding.finish();
    act(segment->row + at.first, at.last - at.first, at.column, at.stop);
  }
  meet();
}

}  // namespace dynamic_lora
