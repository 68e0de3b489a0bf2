// Low-rank deltas in integers, from factors in eight bits and inputs in eight bits (`eight_bits.h`),
// beside products of weights in eight bits. Where ranks fill their tiles, half is read of what factors
// in sixteen bits take.
//
//   a [rank / 16]: float [16], and then [in / 4][16][4]        b [rank / 16][outs / 16][4][16][4]
//
// with fours of inputs side by side for sixteen ranks, and fours of ranks for sixteen outputs; 128 is
// added to each. Before a tile of a are the scales of its ranks, each the product of one of a's rows
// and one of b's. Behind the last input, output or rank there are zeros.
//
// What a row is shrunk to is rounded to eight bits in turn, once the scales are in it, with one more for
// those ranks of a tile that reach the same outputs.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "eight_bits.h"
#include "product_inputs.h"
#include "tiled_deltas.h"
#include "vectors.h"

namespace dynamic_lora {

constexpr int64_t kByteRanks = 16;
constexpr int kByteVecs = kByteRanks / kLanes;

// A row's numbers of a part of a tile of ranks; zeros for its other ranks.
struct ShrunkBytes {
  int8_t values[kByteRanks];
  float scale;
  int32_t start;  // what sums of their products begin with
};

struct ByteTiles;
inline void expand_bytes(const TilePart<ByteTiles>& part, int64_t row, int64_t rows, int64_t column,
                         int64_t stop, float* out, int64_t ldo);

struct ByteTiles {
  using Factor = uint8_t;
  using Shrunk = ShrunkBytes;
  using Blocks = RowBlocks;
  using Segment = TiledSegment<ByteTiles>;
  using Part = TilePart<ByteTiles>;
  static constexpr int64_t kRanks = kByteRanks;
  static constexpr bool kParted = true;
  static constexpr int64_t kBlock = 2 * kTileRows;  // rows that are shrunk together
  static constexpr int64_t kExpanded = kTileChunk;  // rows that are expanded together
  static constexpr int64_t kStrip = 192;            // outputs that one thread expands to at a time
  static constexpr int64_t kAheadInA = 4096;        // bytes that factors are asked for ahead
  static constexpr int64_t kAheadInB = 512;         // what two tiles of outputs take

  // Bytes that a rank of a takes, those of its scale among them.
  static int64_t inputs(int64_t in) { return whole_fours(in) + sizeof(float); }

  // Placed once all parts are known.
  static std::pair<Shrunk*, int64_t> place(const Segment&, int64_t) { return {nullptr, 1}; }

  // Reads inputs as `round_row_to_eight_bits` lays them out.
  class Shrinking {
   public:
    Shrinking(const InputCopies& copies, int64_t in) : copies_(copies), in_(in) {}

    // Shrinks rows [first, first + rows) of a segment to a tile of ranks.
    void shrink(const Segment& s, const Part* part, const Part* last, int64_t first, int64_t rows,
                int64_t rank) const {
      while (part != last && part->first < rank) part++;
      const Part* end = part;
      while (end != last && end->first < rank + kRanks) end++;
      const RowBlocks blocks(rows, kTileRows);
      for (int64_t block = 0; block < blocks.count; block++) {
        const int64_t row = first + blocks.first(block);
        with_rows<kTileRows>(blocks.first(block + 1) - blocks.first(block), [&](auto count) {
          shrink_rows<count()>(s, s.a + rank * inputs(in_), row, part, end);
        });
      }
    }

   private:
    template <int Rows>
    void shrink_rows(const Segment& s, const uint8_t* tile, int64_t first, const Part* part,
                     const Part* end) const {
      const int64_t groups = few_groups(in_), ldx = row_stride<int8_t>(in_), row = s.row + first;
      const uint8_t* factors = tile + kRanks * sizeof(float);
      alignas(64) float sums[Rows * kRanks];
      const auto* ahead = reinterpret_cast<const char*>(factors) + kAheadInA;
      four_tile<Rows, kByteVecs>(copies_.bytes.data() + row * ldx, ldx,
                                 copies_.scales.data() + row * groups,
                                 copies_.starts.data() + row, groups, factors,
                                 whole_fours(in_), true, sums, {ahead, kRanks * 4});
      const auto* scales = reinterpret_cast<const float*>(tile);
      for (int r = 0; r < Rows; r++) {
        float* own = sums + r * kRanks;
        UNROLL
        for (int v = 0; v < kRanks; v += kLanes)
          store(own + v, load(own + v) * load(scales + v) * s.sign);
        for (const Part* each = part; each != end; each++) put(own, *each, each->shrunk[first + r]);
      }
    }

    static void put(const float* sums, const Part& part, ShrunkBytes& to) {
      const int64_t first = part.first % kRanks, last = first + part.last - part.first;
      alignas(64) float own[kRanks] = {};
      std::memcpy(own + first, sums + first, (last - first) * sizeof(float));
      const Rounded rounded = round_group<int8_t, kAddsTwos>(own, kRanks, to.values);
      to.scale = rounded.scale;
      to.start = -kAdded * rounded.total;
    }

    const InputCopies& copies_;
    int64_t in_;
  };

  class Expanding {
   public:
    // Adds what parts give for `rows` rows, from `row` on, to outputs [column, stop) at `out`.
    void expand(const Part* part, const Part* last, int64_t row, int64_t rows, int64_t column,
                int64_t stop, float* out, int64_t ldo) const {
      for (; part != last; part++)
        expand_bytes(*part, row, rows, std::max(column, part->from), std::min(stop, part->to), out,
                     ldo);
    }
  };
};

constexpr int kByteFours = kByteRanks / 4;
constexpr int kTilesTogether = kWidth / kTileOuts;  // as wide as a panel of weights

// Adds what a row was shrunk to, times a tile of ranks of as many neighbouring tiles of outputs.
template <int Vecs>
inline void add_bytes(const ShrunkBytes& shrunk, const Fours (&factors)[kByteFours][Vecs],
                      float* out) {
  IntVec sums[Vecs];
  UNROLL
  for (int v = 0; v < Vecs; v++) sums[v] = shrunk.start - IntVec{};
  UNROLL
  for (int q = 0; q < kByteFours; q++) {
    const Fours inputs = every_four(shrunk.values + 4 * q);
    UNROLL
    for (int v = 0; v < Vecs; v++) sums[v] = dot_fours(sums[v], factors[q][v], inputs);
  }
  const Vec scale = all(shrunk.scale);
  UNROLL
  for (int v = 0; v < Vecs; v++) {
    float* place = out + v * kLanes;
    store(place, fused(__builtin_convertvector(sums[v], Vec), scale, load(place)));
  }
}

// The same for rows whose numbers are `stride` apart; asks for the factors `ahead` bytes further on.
template <int Tiles>
inline void expand_byte_tiles(const ShrunkBytes* shrunk, int64_t stride, int64_t rows,
                              const uint8_t* b, int64_t ahead, float* out, int64_t ldo) {
  constexpr int kVecs = Tiles * kByteVecs;
  Fours factors[kByteFours][kVecs];
  UNROLL
  for (int v = 0; v < kVecs; v++) {
    const int tile = v / kByteVecs, vec = v % kByteVecs;
    UNROLL
    for (int q = 0; q < kByteFours; q++) {
      const uint8_t* place = b + ((tile * kByteFours + q) * kByteVecs + vec) * 4 * kLanes;
      __builtin_prefetch(place + ahead, 0, 2);
      factors[q][v] = four_weights(place);
    }
  }
  for (int64_t r = 0; r < rows; r++) add_bytes(shrunk[r * stride], factors, out + r * ldo);
}

// The same for one tile of which there are `width` outputs: what is behind them is another row's, and
// another thread may write it.
inline void expand_last_bytes(const ShrunkBytes* shrunk, int64_t stride, int64_t rows,
                              const uint8_t* b, int64_t width, float* out, int64_t ldo) {
  for (int64_t r = 0; r < rows; r++, out += ldo) {
    alignas(64) float whole[kTileOuts] = {};
    std::memcpy(whole, out, width * sizeof(float));
    expand_byte_tiles<1>(shrunk + r * stride, stride, 1, b, 0, whole, kTileOuts);
    std::memcpy(out, whole, width * sizeof(float));
  }
}

// Adds what a part gives for `rows` rows, from `row` on, to outputs [column, stop) at `out`.
inline void expand_bytes(const ByteTiles::Part& part, int64_t row, int64_t rows, int64_t column,
                         int64_t stop, float* out, int64_t ldo) {
  constexpr int64_t kTogether = kTilesTogether * kTileOuts;
  const ShrunkBytes* shrunk = part.shrunk + row * part.stride;
  const auto factors = [&] { return part.b + column * kByteRanks; };
  for (; column + kTogether <= stop; column += kTogether)
    expand_byte_tiles<kTilesTogether>(shrunk, part.stride, rows, factors(), ByteTiles::kAheadInB,
                                      out + column, ldo);
  for (; column + kTileOuts <= stop; column += kTileOuts)
    expand_byte_tiles<1>(shrunk, part.stride, rows, factors(), ByteTiles::kAheadInB, out + column,
                         ldo);
  if (column < stop)
    expand_last_bytes(shrunk, part.stride, rows, factors(), stop - column, out + column, ldo);
}

}  // namespace dynamic_lora
