// Decoder layers of the Llama family, neighbours in one parallel region:
//
//   h = hidden + o(attention(rotate(qkv(norm(hidden)))))
//   out = h + down(silu(gate(norm(h))) * up(norm(h)))
//
// with the deltas of the step on every projection. What is between two products
// is a few microseconds of work; as operators of their own they would cost more
// in calls than in arithmetic.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "norm.h"
#include "product.h"
#include "site.h"
#include "team.h"

using namespace dynamic_lora;

namespace {

constexpr int64_t kActivated = 256;  // columns that one thread activates at a time

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

// What a layer keeps for itself while it runs.
struct Scratch : SiteScratch {
  Lines<float> normed, gate_up, activated;
  Claims attended;
};

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
  prepare_sites({&layer.qkv, &layer.o, &layer.gate_up, &layer.down}, step, batch, scratch);
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
