// The projections of a layer with the deltas of a step: found once for all threads, shrunk before
// the product, and added within it or behind.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "bfloat16.h"
#include "byte_factors.h"
#include "eight_bits.h"
#include "factor_tiles.h"
#include "panel_deltas.h"
#include "product.h"
#include "room.h"
#include "team.h"

namespace dynamic_lora {

struct Item;  // of attention

enum SiteNumber { kQkv, kO, kGateUp, kDown, kNumSites };

// A projection, and where the step's deltas for it are found.
struct Site {
  Projection base;
  int64_t group;  // row of the delta tables
};

// The factors of one group in slot 0 of a slab, in tiles or as rows; a null a says that there are
// none. In eight bits they are beside projections in eight bits (kBytes, kAllBytes) alone.
struct SlabFactors {
  const char* a;
  const char* b;
  const int64_t* columns;
  int64_t rank, ldb, format, tiled;

  Factors kind(const Projection& base, const Batch& batch) const {
    const bool paired = format == kBFloat16Factors && base.rounds_to_bfloat16(batch);
    return paired ? Factors::kPaired : widened_factors(format);
  }
};

// Neighbouring rows of neighbouring slots.
struct Run {
  const SlabFactors* groups;
  const int64_t* lengths;
  int64_t first_slot, slots, row;
  float sign;
};

// Neighbouring rows.
struct Rows {
  int64_t first, last;
};

// The rows of a step, and where each is in its sequence and in the cache.
struct Step {
  const float* cos;  // [positions, dim]
  const float* sin;
  const int64_t* places;  // [rows]: the row in cos and sin of each
  const int64_t* cells;  // [rows]
  const Item* items;
  const Run* runs;
  int64_t rows, num_items, num_runs;
  int64_t alone;  // whether all are of different sequences: no token sees another's keys
};

// The deltas of one projection. `within`: added while the product's sums are at hand. `apart`:
// after it, for several segments too short to fill a tile, unless a row has two adapters' deltas.
// `tiled`: factors in tiles of the matrix unit, also after it. `bytes`: factors in eight bits, within
// it as `bytes_within`.
struct SiteDeltas {
  std::vector<Segment> segments;
  std::vector<Part> within, apart;
  TiledDeltas<UnitTiles> tiled;
  TiledDeltas<ByteTiles> bytes;
  std::vector<BytePart> bytes_within;
  bool once;               // no row has two
  std::vector<Rows> bare;  // of gate and up: that have none in tiles, where no row has two

  bool any_tiled() const { return !tiled.empty(); }
  bool any_within() const { return !within.empty() || !bytes_within.empty(); }

  // Whether they read inputs as they are, and not rounded.
  bool read_floats() const {
    return std::any_of(segments.begin(), segments.end(),
                       [](const Segment& s) { return s.kind != Factors::kPaired; });
  }
};

// What is kept for a layer's projections while it runs.
struct SiteScratch {
  std::vector<float> shrunk;
  std::vector<ShrunkBytes> shrunk_bytes;
  SiteDeltas deltas[kNumSites];
  InputCopies copies[2], in_eight_bits[2];
  Memory memory;

  // Of a projection's inputs: they may be made while those of the one before are read.
  InputCopies& copies_for(int number) { return copies[number % 2]; }

  // What factors in eight bits read: what their product does, or copies of their own.
  InputCopies& bytes_for(const Site& site, int number) {
    return site.base.format == kAllBytes ? copies_for(number) : in_eight_bits[number % 2];
  }

  bool copies_bytes(const Site& site, int number) const {
    return site.base.format != kAllBytes && !deltas[number].bytes.empty();
  }
};

// Calls `act` with each run that has factors for a site, the factors of one of its slots after the
// other (their place among all slots' ranks), and the rows of that slot (first, how many).
template <typename Act>
void for_each_slot(const Site& site, const Step& step, const Act& act) {
  for (int64_t i = 0; i < step.num_runs; i++) {
    const Run& run = step.runs[i];
    const SlabFactors& factors = run.groups[site.group];
    if (!factors.a) continue;
    int64_t row = run.row;
    for (int64_t j = 0; j < run.slots; row += run.lengths[j++])
      act(run, factors, (run.first_slot + j) * factors.rank, row, run.lengths[j]);
  }
}

// How many numbers all rows are shrunk to.
inline int64_t shrunk_numbers(const Site& site, const Step& step) {
  int64_t needed = 0;
  for_each_slot(site, step, [&](const Run&, const SlabFactors& factors, int64_t, int64_t,
                                int64_t rows) { needed += factors.rank * rows; });
  return needed;
}

// Adds rows of an adapter whose factors, in tiles, are the table's from rank `first` on.
template <typename Tiles>
void add_tiled(const Site& site, const Run& run, const SlabFactors& factors, int64_t first,
               int64_t row, int64_t rows, float* shrunk, TiledDeltas<Tiles>& deltas) {
  using Factor = typename Tiles::Factor;
  const auto* a = reinterpret_cast<const Factor*>(factors.a) + first * Tiles::inputs(site.base.k);
  const auto* b = reinterpret_cast<const Factor*>(factors.b) + first * tiled_outs(site.base.n);
  deltas.add({a, b, factors.columns + first * 2, reinterpret_cast<typename Tiles::Shrunk*>(shrunk),
              factors.rank, row, rows, run.sign, 0, 0},
             site.base.n);
}

inline void find_segments(const Site& site, const Step& step, const Batch& batch,
                          SiteDeltas& deltas, float* shrunk) {
  const int64_t in = site.base.k;
  deltas.segments.clear();
  deltas.tiled.clear();
  deltas.bytes.clear();
  deltas.once = true;
  for_each_slot(site, step, [&](const Run& run, const SlabFactors& factors, int64_t first,
                                int64_t row, int64_t rows) {
    // Rows from which a merged adapter is taken have another one's deltas, too.
    deltas.once &= run.sign > 0;
    if (factors.format == kByteFactors) {
      add_tiled(site, run, factors, first, row, rows, shrunk, deltas.bytes);
    } else if (factors.tiled) {
      add_tiled(site, run, factors, first, row, rows, shrunk, deltas.tiled);
    } else {
      const int64_t size = factor_bytes(factors.format);
      const int64_t* columns = factors.columns + first * 2;
      deltas.segments.push_back({factors.kind(site.base, batch), factors.a + first * in * size,
                                 factors.b + first * factors.ldb * size, columns, shrunk,
                                 factors.rank, row, rows, factors.ldb, run.sign});
    }
    shrunk += factors.rank * rows;
  });
}

inline void find_bare(SiteDeltas& deltas, int64_t rows) {
  deltas.bare.clear();
  int64_t next = 0;
  for (const TiledSegment<UnitTiles>& segment : deltas.tiled.segments) {
    if (segment.row > next) deltas.bare.push_back({next, segment.row});
    next = segment.row + segment.rows;
  }
  if (next < rows) deltas.bare.push_back({next, rows});
}

// Those of one row stay in order.
template <typename AnyPart>
void sort_by_row(std::vector<AnyPart>& parts) {
  std::stable_sort(parts.begin(), parts.end(),
                   [](const AnyPart& one, const AnyPart& other) { return one.row < other.row; });
}

inline void part_segments(SiteDeltas& deltas) {
  deltas.within.clear();
  deltas.apart.clear();
  // One adapter's factors are read in passing: a second pass would cost more than it hides.
  const bool several = deltas.segments.size() > 1;
  for (const Segment& segment : deltas.segments)
    if (deltas.once && several && segment.rows < kTileRows)
      part_segment(segment, kOutsAlong, deltas.apart);
    else
      part_segment(segment, INT64_MAX / 2, deltas.within);
  sort_by_row(deltas.within);
}

inline void part_bytes(SiteDeltas& deltas) {
  deltas.bytes_within.clear();
  for (const TiledSegment<ByteTiles>& segment : deltas.bytes.segments)
    for (int64_t i = segment.first_part; i < segment.last_part; i++)
      deltas.bytes_within.push_back({deltas.bytes.parts[i], segment.row, segment.rows});
  sort_by_row(deltas.bytes_within);
}

// Finds a step's deltas of a layer's projections, and has room for what these read.
inline void prepare_sites(const Site* const (&sites)[kNumSites], const Step& step,
                          const Batch& batch, SiteScratch& scratch) {
  for (const Site* site : sites) have_room(scratch.shrunk, shrunk_numbers(*site, step));
  for (int number = 0; number < kNumSites; number++) {
    SiteDeltas& deltas = scratch.deltas[number];
    // One projection's deltas are added before the next one's: they share the room.
    find_segments(*sites[number], step, batch, deltas, scratch.shrunk.data());
    part_segments(deltas);
    have_room(scratch.shrunk_bytes, deltas.bytes.shrunk_rows());
    const Projection& base = sites[number]->base;
    base.make_room(batch, scratch.copies_for(number));
    if (deltas.any_tiled()) scratch.copies_for(number).make_room(step.rows, base.k);
    if (scratch.copies_bytes(*sites[number], number))
      make_eight_bit_room(step.rows, base.k, scratch.bytes_for(*sites[number], number));
  }
  for (SiteDeltas& deltas : scratch.deltas) {
    deltas.bytes.place_shrunk(scratch.shrunk_bytes.data());
    part_bytes(deltas);
  }
  find_bare(scratch.deltas[kGateUp], step.rows);
}

// share_* functions are entered by every thread of a team; the others work on their own.

// Makes of row number `row`, x, what a projection and its deltas read in its place.
inline void copy_inputs(const Site& site, SiteScratch& scratch, int number, const float* x,
                        int64_t row, const Batch& batch) {
  InputCopies& copies = scratch.copies_for(number);
  copy_row(x, site.base, batch, row, copies);
  if (scratch.deltas[number].any_tiled() && !site.base.rounds_to_bfloat16(batch))
    round_row_to_bfloat16(x, site.base.k, row, copies);
  if (scratch.copies_bytes(site, number))
    round_row_to_eight_bits(x, site.base.k, row, -1, scratch.bytes_for(site, number));
}

// The same for all rows of x [rows, k].
inline void share_copies(const Site& site, SiteScratch& scratch, int number, const float* x,
                         const Batch& batch) {
  if (!site.base.copies(batch) && !scratch.deltas[number].any_tiled()) return;
#pragma omp for schedule(static) nowait
  for (int64_t row = 0; row < batch.rows; row++)
    copy_inputs(site, scratch, number, x + row * site.base.k, row, batch);
  meet();
}

// Shrinks for all deltas of a projection, whose inputs have been copied: done where deltas are read
// within the product, and else behind the next barrier.
inline void share_site_shrinking(const Site& site, SiteScratch& scratch, int number, const float* x,
                                 const Batch& batch) {
  const SiteDeltas& deltas = scratch.deltas[number];
  const InputCopies& copies = scratch.copies_for(number);
  const int64_t in = site.base.k, outs = site.base.n;
  const int16_t* rounded = copies.values.data();
  int64_t ldx = in;
  if (site.base.spreads(batch)) x = copies.spread.data(), ldx = spread_stride(in);
  if (deltas.any_tiled()) return share_tiled_shrinking(deltas.tiled, copies, in);
  if (!deltas.bytes.empty())
    share_tiled_shrinking(deltas.bytes, scratch.bytes_for(site, number), in);
  else if (!deltas.segments.empty())
    share_shrinking({x, nullptr, ldx, outs, in, outs, rounded, row_stride<int16_t>(in)},
                    deltas.segments);
  if (deltas.any_within()) meet();
}

// The product of a projection, and those deltas that are added within it.
template <typename To>
void share_multiplying(const Site& site, SiteScratch& scratch, int number, const float* x,
                       const To& to, const Batch& batch) {
  const SiteDeltas& deltas = scratch.deltas[number];
  const InputCopies& copies = scratch.copies_for(number);
  if (!deltas.within.empty())
    share_product(x, site.base, to, batch, PanelDeltas(deltas.within, scratch.memory), copies);
  else if (!deltas.bytes_within.empty())
    share_product(x, site.base, to, batch, PanelDeltas(deltas.bytes_within, scratch.memory),
                  copies);
  else
    share_product(x, site.base, to, batch, NoDeltas{}, copies);
}

// Adds the deltas that share_multiplying did not: tiled and `apart`.
inline void share_expanding_behind(const Site& site, SiteScratch& scratch, int number, float* out) {
  const SiteDeltas& deltas = scratch.deltas[number];
  const int64_t outs = site.base.n;
  if (deltas.any_tiled()) share_tiled_expanding(deltas.tiled, out, outs, outs);
  if (!deltas.apart.empty()) share_expanding(deltas.apart, out, outs);
}

// One projection with its deltas, whose inputs have been copied.
inline void share_site(const Site& site, SiteScratch& scratch, int number, const float* x,
                       const Plain& to, const Batch& batch) {
  share_site_shrinking(site, scratch, number, x, batch);
  share_multiplying(site, scratch, number, x, to, batch);
  share_expanding_behind(site, scratch, number, to.y);
}

}  // namespace dynamic_lora
