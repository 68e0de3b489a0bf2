// The deltas of one layer as a call of their own; `segments.h` has the kernels.

#include <vector>

#include "segments.h"

using namespace dynamic_lora;

// a [slots, rank, in] and b [slots, rank, out], columns [slots, rank, 2] or null; slot i has
// lengths[i] rows. sizes: row strides of x, out and b, slot stride of b, slots, rank, inputs,
// outputs, and the bytes of a factor: float32 or bfloat16.
extern "C" void dynamic_lora_segments(const float* x, float* out, const char* a, const char* b,
                                      const int64_t* lengths, const int64_t* columns,
                                      const int64_t* sizes, float sign) {
  static thread_local std::vector<float> scratch;
  static thread_local std::vector<Segment> segments;
  const Deltas deltas{x, out, sizes[0], sizes[1], sizes[6], sizes[7], nullptr, 0};
  const int64_t slots = sizes[4], rank = sizes[5], size = sizes[8];
  const Factors kind = size == sizeof(float) ? Factors::kFloats : Factors::kWidened;
  int64_t rows = 0;
  for (int64_t i = 0; i < slots; i++) rows += lengths[i];
  if (static_cast<int64_t>(scratch.size()) < rows * rank) scratch.resize(rows * rank);
  segments.clear();
  for (int64_t i = 0, row = 0; i < slots; row += lengths[i++])
    segments.push_back({kind, a + i * rank * deltas.in * size, b + i * sizes[3] * size,
                        columns ? columns + i * rank * 2 : nullptr, scratch.data() + row * rank,
                        rank, row, lengths[i], sizes[2], sign});
  const Segment* shared = segments.data();  // of the calling thread, shared by its team
#pragma omp parallel
  share_deltas(deltas, shared, slots);
}
