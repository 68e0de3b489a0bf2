// The deltas of one layer as a call of their own; `segments.h` and `factor_tiles.h` have the kernels.

#include <vector>

#include "byte_factors.h"
#include "factor_tiles.h"
#include "segments.h"
#include "team.h"

using namespace dynamic_lora;

namespace {

// What a call keeps for itself while it runs.
struct Scratch {
  std::vector<Segment> segments;
  std::vector<float> shrunk;
};

template <typename Tiles>
struct TiledScratch {
  TiledDeltas<Tiles> deltas;
  std::vector<typename Tiles::Shrunk> shrunk;
  InputCopies copies;
};

// Adds the deltas of factors in tiles. `make_room` (rows, in, copies) and `round` (x, in, row, copies)
// make the copies of inputs that these are multiplied by.
template <typename Tiles, typename MakeRoom, typename Round>
int64_t add_tiled(const float* x, float* out, const typename Tiles::Factor* a,
                  const typename Tiles::Factor* b, const int64_t* lengths, const int64_t* columns,
                  const int64_t* sizes, float sign, TiledScratch<Tiles>& scratch,
                  const MakeRoom& make_room, const Round& round) {
  const int64_t slots = sizes[0], rank = sizes[1], in = sizes[2], outs = sizes[3];
  int64_t rows = 0;
  for (int64_t i = 0; i < slots; i++) rows += lengths[i];
  Memory memory;
  const bool ready = memory.suffices([&] {
    if (!Tiles::kParted) have_room(scratch.shrunk, rows * rank);
    make_room(rows, in, scratch.copies);
    scratch.deltas.clear();
    for (int64_t i = 0, row = 0; i < slots; row += lengths[i++])
      scratch.deltas.add({a + i * rank * Tiles::inputs(in), b + i * rank * tiled_outs(outs),
                          columns ? columns + i * rank * 2 : nullptr,
                          scratch.shrunk.data() + row * rank, rank, row, lengths[i], sign, 0, 0},
                         outs);
    if (Tiles::kParted) {
      have_room(scratch.shrunk, scratch.deltas.shrunk_rows());
      scratch.deltas.place_shrunk(scratch.shrunk.data());
    }
  });
  if (!ready) return memory.status();
  Team team;
#pragma omp parallel
  {
    const Member member(team);
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < rows; row++) round(x + row * in, in, row, scratch.copies);
    meet();
    share_tiled_shrinking(scratch.deltas, scratch.copies, in);
    meet();
    share_tiled_expanding(scratch.deltas, out, sizes[4], outs);
  }
  return memory.status();
}

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
  static thread_local TiledScratch<UnitTiles> scratch;
  const auto make_room = [](int64_t rows, int64_t in, InputCopies& copies) {
    copies.make_room(rows, in);
  };
  return add_tiled(x, out, a, b, lengths, columns, sizes, sign, scratch, make_room,
                   round_row_to_bfloat16);
}

// The same for those in eight bits.
int64_t dynamic_lora_byte_segments(const float* x, float* out, const uint8_t* a, const uint8_t* b,
                                   const int64_t* lengths, const int64_t* columns,
                                   const int64_t* sizes, float sign) {
  static thread_local TiledScratch<ByteTiles> scratch;
  const auto round = [](const float* x, int64_t in, int64_t row, InputCopies& copies) {
    round_row_to_eight_bits(x, in, row, -1, copies);
  };
  return add_tiled(x, out, a, b, lengths, columns, sizes, sign, scratch, make_eight_bit_room, round);
}

}  // extern "C"
