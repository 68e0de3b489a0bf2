// The deltas of one layer as a call of their own; `segments.h` has the kernels.

#include <vector>

#include "segments.h"

using namespace dynamic_lora;

// a [slots, rank, in], b [slots, rank, out], columns [slots, rank, 2] or null; slot i has
// lengths[i] rows. sizes: row strides of x, out and b, slot stride of b, slots, rank, inputs,
// outputs.
extern "C" void dynamic_lora_segments(const float* x, float* out, const float* a, const float* b,
                                      const int64_t* lengths, const int64_t* columns,
                                      const int64_t* sizes, float sign) {
  static thread_local std::vector<float> scratch;
  static thread_local std::vector<Segment> segments;
  const Deltas deltas{x, out, sizes[0], sizes[1], sizes[6], sizes[7]};
  const int64_t slots = sizes[4], rank = sizes[5];
  int64_t rows = 0;
  for (int64_t i = 0; i < slots; i++) rows += lengths[i];
  if (static_cast<int64_t>(scratch.size()) < rows * rank) scratch.resize(rows * rank);
  segments.clear();
  for (int64_t i = 0, row = 0; i < slots; row += lengths[i++])
    segments.push_back({a + i * rank * deltas.in, b + i * sizes[3],
                        columns ? columns + i * rank * 2 : nullptr, scratch.data() + row * rank,
                        rank, row, lengths[i], sizes[2], sign});
  const Segment* shared = segments.data();  // of the calling thread, shared by its team
#pragma omp parallel
  share_deltas(deltas, shared, slots);
}
