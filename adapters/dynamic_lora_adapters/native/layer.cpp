// Decoder layers of the Llama family, one parallel region each:
//
//   h = hidden + o(attention(rotate(qkv(norm(hidden)))))
//   out = h + down(silu(gate(norm(h))) * up(norm(h)))
//
// with the deltas of the step on every projection. What is between two products
// is a few microseconds of work; as operators of their own they would cost more
// in calls than in arithmetic.

#include <vector>

#include "attention.h"
#include "factor_tiles.h"
#include "norm.h"
#include "panel_deltas.h"
#include "product.h"

using namespace dynamic_lora;

namespace {

constexpr int64_t kActivated = 256;  // columns that one thread activates at a time

// A projection, and where the step's deltas for it are found.
struct Site {
  Projection base;
  int64_t group;  // row of the delta tables
};

struct Layer {
  Norm input_norm, middle_norm, q_norm, k_norm;
  Site qkv, o, gate_up, down;
  void* keys;    // [cells, kv_heads, dim], of floats or, with `brains`, in bfloat16
  void* values;  // [cells, kv_heads, dim]
  int64_t brains;
  int64_t heads, kv_heads, dim;
  int64_t q, k, v, gate, up;  // first columns in the outputs of qkv and gate_up
  float scaling;
};

// The factors of one group in slot 0 of a slab, each of `size` bytes, in tiles or as rows; a null a
// says that there are none.
struct SlabFactors {
  const char* a;
  const char* b;
  const int64_t* columns;
  int64_t rank, ldb, size, tiled;

  Factors kind(const Projection& base) const {
    if (size == sizeof(float)) return Factors::kFloats;
    return base.rounds_to_brains() ? Factors::kPaired : Factors::kWidened;
  }
};

// Neighbouring rows of neighbouring slots.
struct Run {
  const SlabFactors* groups;
  const int64_t* lengths;
  int64_t first_slot, slots, row;
  float sign;
};

struct Step {
  const float* cos;  // [positions, dim]
  const float* sin;
  const int64_t* places;  // [rows]: the position of each
  const int64_t* cells;  // [rows]
  const int64_t* items;  // as `share_attention` has them
  const Run* runs;
  int64_t rows, num_items, num_runs;
};

// The deltas of one projection. Those of few rows are added `apart` from the product, once that is
// done, for tiles of an adapter's own rows would not be full; unless rows have two adapters' deltas.
// Those of factors in tiles are all added behind it.
struct SiteDeltas {
  std::vector<Segment> segments;
  std::vector<Part> within, apart;
  TiledDeltas tiled;
  bool once;  // no row has two
};

// What a layer keeps for itself while it runs.
struct Scratch {
  Lines<float> normed, gate_up, activated;
  std::vector<float> shrunk;
  SiteDeltas deltas[4];
  InputCopies copies;
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

void find_segments(const Site& site, const Step& step, SiteDeltas& deltas, float* shrunk) {
  const int64_t in = site.base.k, outs = site.base.n;
  deltas.segments.clear();
  deltas.tiled.clear();
  deltas.once = true;
  for_each_slot(site, step, [&](const Run& run, const SlabFactors& factors, int64_t first,
                                int64_t row, int64_t rows) {
    // Rows from which a merged adapter is taken have another one's deltas, too.
    deltas.once &= run.sign > 0;
    const int64_t* columns = factors.columns + first * 2;
    if (factors.tiled) {
      const auto *a = reinterpret_cast<const Brain*>(factors.a) + first * tiled_inputs(in),
                 *b = reinterpret_cast<const Brain*>(factors.b) + first * tiled_outs(outs);
      deltas.tiled.add({a, b, columns, reinterpret_cast<Brain*>(shrunk), factors.rank, row, rows,
                        run.sign, 0, 0},
                       outs);
    } else {
      deltas.segments.push_back({factors.kind(site.base), factors.a + first * in * factors.size,
                                 factors.b + first * factors.ldb * factors.size, columns, shrunk,
                                 factors.rank, row, rows, factors.ldb, run.sign});
    }
    shrunk += factors.rank * rows;
  });
}

void part_segments(SiteDeltas& deltas) {
  deltas.within.clear();
  deltas.apart.clear();
  for (const Segment& segment : deltas.segments)
    if (deltas.once && segment.rows < kTileRows)
      part_segment(segment, kOutsAlong, deltas.apart);
    else
      part_segment(segment, INT64_MAX / 2, deltas.within);
  std::stable_sort(deltas.within.begin(), deltas.within.end(),
                   [](const Part& one, const Part& other) { return one.row < other.row; });
}

// The functions below are called by a whole team of threads.

void share_norm(const Norm& norm, const float* x, float* out, int64_t rows, int64_t dim) {
#pragma omp for schedule(static)
  for (int64_t row = 0; row < rows; row++) normalise(norm, x + row * dim, out + row * dim, dim);
}

// One projection with deltas of factors in tiles.
void share_tiled_site(const Site& site, const TiledDeltas& deltas, const float* x,
                      const float* residual, float* out, int64_t rows, InputCopies& copies) {
  const int64_t in = site.base.k, outs = site.base.n;
  if (!site.base.rounds_to_brains()) share_brain_rounding(x, rows, in, copies);
  share_tiled_shrinking(deltas, copies.values.data(), in);
  share_product(x, site.base, residual, out, rows, NoDeltas{}, copies);
  share_tiled_expanding(deltas, out, outs, outs);
}

// One projection with its deltas.
void share_site(const Site& site, Scratch& scratch, int number, const float* x,
                const float* residual, float* out, int64_t rows) {
  const auto& [segments, within, apart, tiled, once] = scratch.deltas[number];
  const auto product = [&](const auto& extra) {
    share_product(x, site.base, residual, out, rows, extra, scratch.copies);
  };
  share_copying(x, site.base, rows, scratch.copies);
  if (!tiled.segments.empty())
    return share_tiled_site(site, tiled, x, residual, out, rows, scratch.copies);
  if (segments.empty()) return product(NoDeltas{});
  const int64_t in = site.base.k, outs = site.base.n;
  const Deltas deltas{x,    out, in, outs, in, outs, scratch.copies.values.data(),
                      row_stride<int16_t>(in)};
  share_shrinking(deltas, segments);
  if (within.empty()) {
    product(NoDeltas{});
  } else {
#pragma omp barrier
    product(PanelDeltas(within.data(), static_cast<int64_t>(within.size())));
  }
  if (!apart.empty()) share_expanding(apart, out, outs);
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

// Rotates the queries in place, and writes keys and values to the cache.
template <typename Cached>
void share_rotation(const Layer& layer, const Step& step, float* qkv) {
  const int64_t dim = layer.dim, width = layer.qkv.base.n;
  auto* keys = static_cast<Cached*>(layer.keys);
  auto* values = static_cast<Cached*>(layer.values);
#pragma omp for schedule(static)
  for (int64_t row = 0; row < step.rows; row++) {
    float* q = qkv + row * width + layer.q;
    float* k = qkv + row * width + layer.k;
    const float* v = qkv + row * width + layer.v;
    const int64_t place = step.places[row] * dim;
    const float *cos = step.cos + place, *sin = step.sin + place;
    const int64_t cell = step.cells[row] * layer.kv_heads * dim;
    for (int64_t head = 0; head < layer.heads; head++, q += dim) {
      if (layer.q_norm.weight) normalise(layer.q_norm, q, q, dim);
      rotate(cos, sin, q, q, dim);
    }
    for (int64_t head = 0; head < layer.kv_heads; head++, k += dim) {
      if (layer.k_norm.weight) normalise(layer.k_norm, k, k, dim);
      rotate(cos, sin, k, k, dim);
      keep(k, dim, keys + cell + head * dim);
    }
    keep(v, layer.kv_heads * dim, values + cell);
  }
}

// x * sigmoid(x), from e^-|x| so that nothing overflows.
Vec silu(Vec x) {
  const Vec small = exp_negative(x < Vec{} ? x : -x);
  return x * (x < Vec{} ? small : all(1.0f)) / (1.0f + small);
}

void share_activation(const Layer& layer, const float* gate_up, float* out, int64_t rows) {
  const int64_t dim = layer.down.base.k, width = layer.gate_up.base.n;
  const int64_t parts = (dim + kActivated - 1) / kActivated;
#pragma omp for schedule(static)
  for (int64_t item = 0; item < rows * parts; item++) {
    const int64_t row = item / parts, first = item % parts * kActivated;
    const float* gate = gate_up + row * width + layer.gate;
    const float* up = gate_up + row * width + layer.up;
    const int64_t stop = std::min(first + kActivated, dim);
    int64_t i = first;
    for (; i + kLanes <= stop; i += kLanes)
      store(out + row * dim + i, silu(load(gate + i)) * load(up + i));
    for (; i < stop; i++) out[row * dim + i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
  }
}

template <typename Cached>
void share_cached(const Layer& layer, const Step& step, float* qkv, float* attended) {
  share_rotation<Cached>(layer, step, qkv);
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
  share_attention(attention, step.items, step.num_items);
}

void share_attending(const Layer& layer, const Step& step, Scratch& scratch, const float* hidden,
                     float* qkv, float* attended) {
  share_norm(layer.input_norm, hidden, scratch.normed.data(), step.rows, layer.qkv.base.k);
  share_site(layer.qkv, scratch, 0, scratch.normed.data(), nullptr, qkv, step.rows);
  if (layer.brains)
    share_cached<Brain>(layer, step, qkv, attended);
  else
    share_cached<float>(layer, step, qkv, attended);
}

void share_finish(const Layer& layer, const Step& step, Scratch& scratch, const float* hidden,
                  const float* attended, float* out) {
  share_site(layer.o, scratch, 1, attended, hidden, out, step.rows);
  share_norm(layer.middle_norm, out, scratch.normed.data(), step.rows, layer.gate_up.base.k);
  share_site(layer.gate_up, scratch, 2, scratch.normed.data(), nullptr,
             scratch.gate_up.data(), step.rows);
  share_activation(layer, scratch.gate_up.data(), scratch.activated.data(), step.rows);
  share_site(layer.down, scratch, 3, scratch.activated.data(), out, out, step.rows);
}

Scratch& prepare(const Layer& layer, const Step& step) {
  static thread_local Scratch scratch;
  have_room(scratch.normed, step.rows * std::max(layer.qkv.base.k, layer.gate_up.base.k));
  have_room(scratch.gate_up, step.rows * layer.gate_up.base.n);
  have_room(scratch.activated, step.rows * layer.down.base.k);
  const Site* sites[] = {&layer.qkv, &layer.o, &layer.gate_up, &layer.down};
  for (const Site* site : sites) {
    site->base.make_room(step.rows, scratch.copies);
    have_room(scratch.shrunk, shrunk_numbers(*site, step));
  }
  for (int number = 0; number < 4; number++) {
    SiteDeltas& deltas = scratch.deltas[number];
    // One projection's deltas are added before the next one's: they share the room.
    find_segments(*sites[number], step, deltas, scratch.shrunk.data());
    part_segments(deltas);
    if (!deltas.tiled.segments.empty())
      scratch.copies.make_room(step.rows, sites[number]->base.k);
  }
  return scratch;
}

}  // namespace

extern "C" {

// Whether inputs are rounded to bfloat16, where the processor multiplies that; says whether they are.
int64_t dynamic_lora_round_to_bfloat16(int64_t wanted) {
  brain_inputs = wanted && kBrainInputs;
  return brain_inputs;
}

// Layers one after the other, for a step whose tokens all are among its items.
// hidden, out [rows, hidden]; qkv [rows, outputs of qkv] and attended [rows, heads, dim] are
// overwritten.
void dynamic_lora_layers(const Layer* const* layers, int64_t count, const Step* step,
                         const float* hidden, float* qkv, float* attended, float* out) {
  for (int64_t i = 0; i < count; i++) {
    const Layer& layer = *layers[i];
    const float* in = i == 0 ? hidden : out;
    Scratch& scratch = prepare(layer, *step);
#pragma omp parallel
    {
      share_attending(layer, *step, scratch, in, qkv, attended);
      share_finish(layer, *step, scratch, in, attended, out);
    }
  }
}

// The first half of a layer: writes the cache, and attends for the tokens among the items.
void dynamic_lora_layer_attend(const Layer* layer, const Step* step, const float* hidden,
                               float* qkv, float* attended) {
  Scratch& scratch = prepare(*layer, *step);
#pragma omp parallel
  share_attending(*layer, *step, scratch, hidden, qkv, attended);
}

// Its second half, once every row of `attended` is there.
void dynamic_lora_layer_finish(const Layer* layer, const Step* step, const float* hidden,
                               const float* attended, float* out) {
  Scratch& scratch = prepare(*layer, *step);
#pragma omp parallel
  share_finish(*layer, *step, scratch, hidden, attended, out);
}

}  // extern "C"
