// RMSNorm as a call of its own; `norm.h` has the arithmetic.

#include "norm.h"

using namespace dynamic_lora;

namespace {
constexpr int64_t kRowsWorthSharing = 64;  // waking the other threads takes longer for fewer
}

// x and out [rows, dim], weight [dim].
extern "C" void dynamic_lora_rms_norm(const float* x, const float* weight, float* out, int64_t rows,
                                      int64_t dim, float eps, float offset) {
  const Norm norm{weight, eps, offset};
#pragma omp parallel for schedule(static) if (rows >= kRowsWorthSharing)
  for (int64_t row = 0; row < rows; row++) normalise(norm, x + row * dim, out + row * dim, dim);
}
