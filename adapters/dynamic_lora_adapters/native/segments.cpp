// The deltas of one layer as a call of their own; `segments.h` and `factor_tiles.h` have the kernels.

#include <vector>

#include "factor_tiles.h"
#include "segments.h"
#include "team.h"

using namespace dynamic_lora;

namespace {

// What a call keeps for itself while it runs.
struct Scratch {
  std::vector<Segment> segments;
  TiledDeltas tiled;
  std::vector<float> shrunk;
  InputCopies copies;
};

}  // namespace

extern "C" {

// Whether factors in bfloat16 may be laid out in tiles.
int64_t dynamic_lora_reads_tiles() { return kMatrixUnit; }

// a [slots, rank, in] and b [slots, rank, out], columns [slots, rank, 2] or null; slot i has
// lengths[i] rows. sizes: row strides of x, out and b, slot stride of b, slots, rank, inputs,
// outputs, and the format of factors. Returns what `Memory` says; where that ran out, nothing was
// added.
int64_t dynamic_lora_segments(const float* x, float* out, const char* a, const char* b,
                              const int64_t* lengths, const int64_t* columns,
                              const int64_t* sizes, float sign) {
  static thread_local Scratch own;
  Scratch& scratch = own;  // of the calling thread, for its team
  const Deltas deltas{x, out, sizes[0], sizes[1], sizes[6], sizes[7], nullptr, 0};
  const int64_t slots = sizes[4], rank = sizes[5], size = factor_bytes(sizes[8]);
  const Factors kind = widened_factors(sizes[8]);
  int64_t rows = 0;
  for (int64_t i = 0; i < slots; i++) rows += lengths[i];
  Memory memory;
  const bool ready = memory.suffices([&] {
    have_room(scratch.shrunk, rows * rank);
    scratch.segments.clear();
    for (int64_t i = 0, row = 0; i < slots; row += lengths[i++])
      scratch.segments.push_back({kind, a + i * rank * deltas.in * size, b + i * sizes[3] * size,
                                  columns ? columns + i * rank * 2 : nullptr,
                                  scratch.shrunk.data() + row * rank, rank, row, lengths[i],
                                  sizes[2], sign});
  });
  if (!ready) return memory.status();
  Team team;
#pragma omp parallel
  {
    const Member member(team);
    share_deltas(deltas, scratch.segments);
  }
  return memory.status();
}

// The same for factors in tiles, whose slots follow each other; x [rows, in], out [rows, out].
// sizes: slots, rank, inputs, outputs, row stride of out.
int64_t dynamic_lora_tiled_segments(const float* x, float* out, const BFloat16* a, const BFloat16* b,
                                    const int64_t* lengths, const int64_t* columns,
                                    const int64_t* sizes, float sign) {
  static thread_local Scratch own;
  Scratch& scratch = own;
  const int64_t slots = sizes[0], rank = sizes[1], in = sizes[2], outs = sizes[3];
  int64_t rows = 0;
  for (int64_t i = 0; i < slots; i++) rows += lengths[i];
  Memory memory;
  const bool ready = memory.suffices([&] {
    have_room(scratch.shrunk, rows * rank);
    scratch.copies.make_room(rows, in);
    scratch.tiled.clear();
    auto* shrunk = reinterpret_cast<BFloat16*>(scratch.shrunk.data());
    for (int64_t i = 0, row = 0; i < slots; row += lengths[i++])
      scratch.tiled.add({a + i * rank * tiled_inputs(in), b + i * rank * tiled_outs(outs),
                         columns ? columns + i * rank * 2 : nullptr, shrunk + row * rank, rank,
                         row, lengths[i], sign, 0, 0},
                        outs);
  });
  if (!ready) return memory.status();
  Team team;
#pragma omp parallel
  {
    const Member member(team);
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++)
      round_row_to_bfloat16(x + row * in, in, row, scratch.copies);
    meet();
    share_tiled_shrinking(scratch.tiled, scratch.copies.values.data(), in);
    meet();
    share_tiled_expanding(scratch.tiled, out, sizes[4], outs);
  }
  return memory.status();
}

}  // extern "C"
