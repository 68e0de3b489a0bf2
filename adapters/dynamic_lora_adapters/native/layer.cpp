// Decoder layers of the Llama family, neighbours in one parallel region:
//
//   h = hidden + o(attention(rotate(qkv(norm(hidden)))))
//   out = h + down(silu(gate(norm(h))) * up(norm(h)))
//
// with the deltas of the step on every projection. What is between two products
// is a few microseconds of work; as operators of their own they would cost more
// in calls than in arithmetic.

#include <vector>

#include "attention.h"
#include "byte_factors.h"
#include "factor_tiles.h"
#include "norm.h"
#include "panel_deltas.h"
#include "product.h"
#include "team.h"

using namespace dynamic_lora;

namespace {

constexpr int64_t kActivated = 256;  // columns that one thread activates at a time

enum SiteNumber { kQkv, kO, kGateUp, kDown, kNumSites };

// A projection, and where the step's deltas for it are found.
struct Site {
  Projection base;
  int64_t group;  // row of the delta tables
};

struct Layer {
  Norm input_norm, middle_norm, q_norm, k_norm;
  Site qkv, o, gate_up, down;
  void* keys;    // [cells, kv_heads, dim], of floats or, with `in_bfloat16`, in bfloat16
  void* values;  // [cells, kv_heads, dim]
  int64_t in_bfloat16;
  int64_t heads, kv_heads, dim;
  int64_t q, k, v, gate, up;  // first columns in the outputs of qkv and gate_up
  float scaling;
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

// What a layer keeps for itself while it runs.
struct Scratch {
  Lines<float> normed, gate_up, activated;
  std::vector<float> shrunk;
  std::vector<ShrunkBytes> shrunk_bytes;
  SiteDeltas deltas[kNumSites];
  InputCopies copies[2], in_eight_bits[2];
  Claims attended;
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
int64_t shrunk_numbers(const Site& site, const Step& step) {
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

void find_segments(const Site& site, const Step& step, const Batch& batch, SiteDeltas& deltas,
                   float* shrunk) {
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

void find_bare(SiteDeltas& deltas, int64_t rows) {
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

void part_segments(SiteDeltas& deltas) {
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

void part_bytes(SiteDeltas& deltas) {
  deltas.bytes_within.clear();
  for (const TiledSegment<ByteTiles>& segment : deltas.bytes.segments)
    for (int64_t i = segment.first_part; i < segment.last_part; i++)
      deltas.bytes_within.push_back({deltas.bytes.parts[i], segment.row, segment.rows});
  sort_by_row(deltas.bytes_within);
}

// share_* functions are entered by every thread of a team; the others work on their own.

// Makes of row number `row`, x, what a projection and its deltas read in its place.
void copy_inputs(const Site& site, Scratch& scratch, int number, const float* x, int64_t row,
                 const Batch& batch) {
  InputCopies& copies = scratch.copies_for(number);
  copy_row(x, site.base, batch, row, copies);
  if (scratch.deltas[number].any_tiled() && !site.base.rounds_to_bfloat16(batch))
    round_row_to_bfloat16(x, site.base.k, row, copies);
  if (scratch.copies_bytes(site, number))
    round_row_to_eight_bits(x, site.base.k, row, -1, scratch.bytes_for(site, number));
}

// The same for all rows of x [rows, k].
void share_copies(const Site& site, Scratch& scratch, int number, const float* x,
                  const Batch& batch) {
  if (!site.base.copies(batch) && !scratch.deltas[number].any_tiled()) return;
#pragma omp for schedule(static) nowait
  for (int64_t row = 0; row < batch.rows; row++)
    copy_inputs(site, scratch, number, x + row * site.base.k, row, batch);
  meet();
}

// The inputs of a projection, from x [rows, k].
void share_norm(const Norm& norm, const Site& site, Scratch& scratch, int number, const float* x,
                const Batch& batch) {
  const int64_t dim = site.base.k;
#pragma omp for schedule(static) nowait
  for (int64_t row = 0; row < batch.rows; row++) {
    float* normed = scratch.normed.data() + row * dim;
    normalise(norm, x + row * dim, normed, dim);
    copy_inputs(site, scratch, number, normed, row, batch);
  }
  meet();
}

// Shrinks for all deltas of a projection, whose inputs have been copied: done where deltas are read
// within the product, and else behind the next barrier.
void share_site_shrinking(const Site& site, Scratch& scratch, int number, const float* x,
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
void share_multiplying(const Site& site, Scratch& scratch, int number, const float* x, const To& to,
                       const Batch& batch) {
  const SiteDeltas& deltas = scratch.deltas[number];
  const InputCopies& copies = scratch.copies_for(number);
  if (!deltas.within.empty())
    share_product(x, site.base, to, batch, PanelDeltas(deltas.within, scratch.memory), copies);
  else if (!deltas.bytes_within.empty())
    share_product(x, site.base, to, batch, PanelDeltas(deltas.bytes_within, scratch.memory), copies);
  else
    share_product(x, site.base, to, batch, NoDeltas{}, copies);
}

// Adds the deltas that share_multiplying did not: tiled and `apart`.
void share_expanding_behind(const Site& site, Scratch& scratch, int number, float* out) {
  const SiteDeltas& deltas = scratch.deltas[number];
  const int64_t outs = site.base.n;
  if (deltas.any_tiled()) share_tiled_expanding(deltas.tiled, out, outs, outs);
  if (!deltas.apart.empty()) share_expanding(deltas.apart, out, outs);
}

// One projection with its deltas, whose inputs have been copied.
void share_site(const Site& site, Scratch& scratch, int number, const float* x, const Plain& to,
                const Batch& batch) {
  share_site_shrinking(site, scratch, number, x, batch);
  share_multiplying(site, scratch, number, x, to, batch);
  share_expanding_behind(site, scratch, number, to.y);
}

// Rotary embedding (Su et al. 2021) of one head; its halves are the pairs' two parts.
void rotate(const float* cos, const float* sin, const float* from, float* to, int64_t dim) {
  const int64_t half = dim / 2;
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const Vec low = load(from + i), high = load(from + half + i);
    store(to + i, low * load(cos + i) - high * load(sin + i));
    store(to + half + i, high * load(cos + half + i) + low * load(sin + half + i));
  }
  for (; i < half; i++) {
    const float low = from[i], high = from[half + i];
    to[i] = low * cos[i] - high * sin[i];
    to[half + i] = high * cos[half + i] + low * sin[half + i];
  }
}

// Rotates the queries of a row in place, and writes its keys and values to the cache.
template <typename Cached>
void rotate_row(const Layer& layer, const Step& step, float* qkv, int64_t row) {
  const int64_t dim = layer.dim, width = layer.qkv.base.n;
  float* q = qkv + row * width + layer.q;
  float* k = qkv + row * width + layer.k;
  const float* v = qkv + row * width + layer.v;
  const int64_t place = step.places[row] * dim;
  const float *cos = step.cos + place, *sin = step.sin + place;
  const int64_t cell = step.cells[row] * layer.kv_heads * dim;
  auto* keys = static_cast<Cached*>(layer.keys) + cell;
  auto* values = static_cast<Cached*>(layer.values) + cell;
  for (int64_t head = 0; head < layer.heads; head++, q += dim) {
    if (layer.q_norm.weight) normalise(layer.q_norm, q, q, dim);
    rotate(cos, sin, q, q, dim);
  }
  for (int64_t head = 0; head < layer.kv_heads; head++, k += dim) {
    if (layer.k_norm.weight) normalise(layer.k_norm, k, k, dim);
    rotate(cos, sin, k, k, dim);
    keep(k, dim, keys + head * dim);
  }
  keep(v, layer.kv_heads * dim, values);
}

// silu(gate) * up for columns [column, stop) of rows [first, first + rows).
void activate(const Layer& layer, const float* gate_up, int64_t first, int64_t rows,
              int64_t column, int64_t stop, const Gated& to) {
  const int64_t dim = layer.down.base.k, width = layer.gate_up.base.n;
  for (int64_t row = first; row < first + rows; row++) {
    const float* gate = gate_up + row * width + layer.gate;
    const float* up = gate_up + row * width + layer.up;
    int64_t i = column;
    for (; i + kLanes <= stop; i += kLanes)
      to.put(row, dim, i, silu(load(gate + i)) * load(up + i));
    // Rows that end so are neither rounded nor spread here.
    for (; i < stop; i++) to.y[row * dim + i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
  }
}

// Activates these rows; visible to the team only after the next meet().
void share_activation(const Layer& layer, const float* gate_up, const Rows& rows,
                      const Gated& to) {
  const int64_t dim = layer.down.base.k, parts = (dim + kActivated - 1) / kActivated;
#pragma omp for schedule(static) nowait
  for (int64_t item = rows.first * parts; item < rows.last * parts; item++) {
    const int64_t column = item % parts * kActivated;
    activate(layer, gate_up, item / parts, 1, column, std::min(column + kActivated, dim), to);
  }
}

// Where activated values go: they are spread or rounded as they are made if the next product reads
// them so, and kept as they are for what does not.
Gated activated_to(const Layer& layer, Scratch& scratch, const Batch& batch) {
  const Projection& down = layer.down.base;
  const SiteDeltas& deltas = scratch.deltas[kDown];
  InputCopies& copies = scratch.copies_for(kDown);
  Gated to{};
  if (down.rounds_to_bfloat16(batch) && down.k % (2 * kLanes) == 0)
    to.rounded = copies.values.data();
  else if (down.spreads(batch) && down.k % kLanes == 0 && !deltas.any_tiled())
    to.spread = copies.spread.data();
  if (!to.spread && (!to.rounded || deltas.read_floats())) to.y = scratch.activated.data();
  return to;
}

// The gated projection, whose inputs have been copied, activated: within the product, behind it
// together with the deltas of factors in tiles, or once all is done.
void share_gating(const Layer& layer, Scratch& scratch, const float* x, const Gated& to,
                  const Batch& batch) {
  const Site& site = layer.gate_up;
  const SiteDeltas& deltas = scratch.deltas[kGateUp];
  const bool halves = site.base.halves, tiled = deltas.any_tiled();
  float* gate_up = scratch.gate_up.data();
  share_site_shrinking(site, scratch, kGateUp, x, batch);
  if (halves && layer.gate == 0 && !tiled && deltas.apart.empty())
    return share_multiplying(site, scratch, kGateUp, x, to, batch);
  share_multiplying(site, scratch, kGateUp, x, Plain{nullptr, gate_up}, batch);
  if (halves && tiled && deltas.once) {
    for (const Rows& bare : deltas.bare) share_activation(layer, gate_up, bare, to);
    return share_tiled_halves(deltas.tiled, gate_up, site.base.n,
                              [&](int64_t row, int64_t count, int64_t column, int64_t stop) {
                                activate(layer, gate_up, row, count, column, stop, to);
                              });
  }
  share_expanding_behind(site, scratch, kGateUp, gate_up);
  share_activation(layer, gate_up, {0, batch.rows}, to);
  meet();
}

// Rotates, writes the cache, attends, and, where one thread has all of a row, copies what it gives
// for the next projection.
template <typename Cached>
void share_cached(const Layer& layer, const Step& step, const Batch& batch, Scratch& scratch,
                  float* qkv, float* attended) {
  const bool whole = attends_whole_rows(step.num_items), alone = whole && step.alone;
  const int64_t width = layer.o.base.k;
  if (!alone) {
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < step.rows; row++) rotate_row<Cached>(layer, step, qkv, row);
    meet();
  }
  const Attention<Cached> attention{qkv + layer.q,
                                    static_cast<const Cached*>(layer.keys),
                                    static_cast<const Cached*>(layer.values),
                                    attended,
                                    nullptr,
                                    layer.dim,
                                    layer.qkv.base.n,
                                    layer.heads,
                                    layer.kv_heads,
                                    layer.dim,
                                    layer.dim,
                                    layer.scaling,
                                    0.0f};
  const auto begin = [&](int64_t row) {
    if (alone) rotate_row<Cached>(layer, step, qkv, row);
  };
  const auto end = [&](int64_t row) {
    if (whole) copy_inputs(layer.o, scratch, kO, attended + row * width, row, batch);
  };
  share_attention(attention, step.items, step.num_items, scratch.attended, scratch.memory, begin,
                  end);
}

void share_attending(const Layer& layer, const Step& step, const Batch& batch, Scratch& scratch,
                     const float* hidden, float* qkv, float* attended) {
  share_norm(layer.input_norm, layer.qkv, scratch, kQkv, hidden, batch);
  share_site(layer.qkv, scratch, kQkv, scratch.normed.data(), {nullptr, qkv}, batch);
  if (layer.in_bfloat16)
    share_cached<BFloat16>(layer, step, batch, scratch, qkv, attended);
  else
    share_cached<float>(layer, step, batch, scratch, qkv, attended);
}

// `copied`: `attended` is already in the input copies of `o`.
void share_finish(const Layer& layer, const Batch& batch, Scratch& scratch, const float* hidden,
                  const float* attended, bool copied, float* out) {
  if (!copied) share_copies(layer.o, scratch, kO, attended, batch);
  share_site(layer.o, scratch, kO, attended, {hidden, out}, batch);
  share_norm(layer.middle_norm, layer.gate_up, scratch, kGateUp, out, batch);
  const Gated activated = activated_to(layer, scratch, batch);
  share_gating(layer, scratch, scratch.normed.data(), activated, batch);
  if (!activated.rounded && !activated.spread)
    share_copies(layer.down, scratch, kDown, activated.y, batch);
  share_site(layer.down, scratch, kDown, activated.y, {out, out}, batch);
}

// The calling thread's scratch, used by its whole team.
Scratch& own_scratch() {
  static thread_local Scratch scratch;
  scratch.memory.begin();
  return scratch;
}

void prepare(const Layer& layer, const Step& step, const Batch& batch, Scratch& scratch) {
  have_room(scratch.normed, step.rows * std::max(layer.qkv.base.k, layer.gate_up.base.k));
  have_room(scratch.gate_up, step.rows * layer.gate_up.base.n);
  have_room(scratch.activated, step.rows * layer.down.base.k);
  const Site* sites[] = {&layer.qkv, &layer.o, &layer.gate_up, &layer.down};
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
  scratch.attended.next = 0;
}

// prepare(); false if memory ran out, now or earlier in this call.
bool prepared(const Layer& layer, const Step& step, const Batch& batch, Scratch& scratch) {
  Memory& memory = scratch.memory;
  return !memory.ran_out() && memory.suffices([&] { prepare(layer, step, batch, scratch); });
}

}  // namespace

extern "C" {

// So many more, or fewer, want inputs whole from now on.
void dynamic_lora_keep_inputs_whole(int64_t more) { whole_inputs += more; }

// Layers one after the other, for a step whose tokens all are among its items.
// hidden, out [rows, hidden]; qkv [rows, outputs of qkv] and attended [rows, heads, dim] are
// overwritten. Returns what `Memory` says, as the others do.
int64_t dynamic_lora_layers(const Layer* const* layers, int64_t count, const Step* step,
                            const float* hidden, float* qkv, float* attended, float* out) {
  Scratch& scratch = own_scratch();
  const Batch batch(step->rows);
  bool ready = true;
  const bool copied = attends_whole_rows(step->num_items);
  Team team;
#pragma omp parallel
  {
    const Member member(team);
    for (int64_t i = 0; i < count; i++) {
      const Layer& layer = *layers[i];
      const float* in = i == 0 ? hidden : out;
      // Behind a layer's last product, threads look whether it has deltas: not while these are made
      // anew.
      meet([&] { ready = prepared(layer, *step, batch, scratch); });
      // Unlike `memory`, it stays as it is until all threads have read it.
      if (!ready) break;
      share_attending(layer, *step, batch, scratch, in, qkv, attended);
      share_finish(layer, batch, scratch, in, attended, copied, out);
    }
  }
  return scratch.memory.status();
}

// The first half of a layer: writes the cache, and attends for the tokens among the items.
int64_t dynamic_lora_layer_attend(const Layer* layer, const Step* step, const float* hidden,
                                  float* qkv, float* attended) {
  Scratch& scratch = own_scratch();
  const Batch batch(step->rows);
  if (!prepared(*layer, *step, batch, scratch)) return scratch.memory.status();
  Team team;
#pragma omp parallel
  {
    const Member member(team);
    share_attending(*layer, *step, batch, scratch, hidden, qkv, attended);
  }
  return scratch.memory.status();
}

// Its second half, once every row of `attended` is there.
int64_t dynamic_lora_layer_finish(const Layer* layer, const Step* step, const float* hidden,
                                  const float* attended, float* out) {
  Scratch& scratch = own_scratch();
  const Batch batch(step->rows);
  if (!prepared(*layer, *step, batch, scratch)) return scratch.memory.status();
  Team team;
#pragma omp parallel
  {
    const Member member(team);
    share_finish(*layer, batch, scratch, hidden, attended, false, out);
  }
  return scratch.memory.status();
}

}  // extern "C"
