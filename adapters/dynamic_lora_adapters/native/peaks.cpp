// What greedy decoding needs of a row of logits: where it is highest, and what divides it.

#include "scan.h"

using namespace dynamic_lora;

// logits [rows, width]; the others [rows]. The first of equal ones is the highest. A log mass is
// no number if one of the row is none, or none is finite.
extern "C" void dynamic_lora_peaks(const float* logits, int64_t rows, int64_t width, int64_t* index,
                                   float* heights, float* log_masses) {
#pragma omp parallel for schedule(dynamic) if (rows > 1)
  for (int64_t r = 0; r < rows; r++) {
    const float* row = logits + r * width;
    heights[r] = highest_of(row, width);
    index[r] = std::find(row, row + width, heights[r]) - row;
    if (index[r] == width) index[r] = 0;  // a row of nothing but NaN
    const double total = mass(row, width, heights[r], [](Vec, int64_t) {});
    log_masses[r] = static_cast<float>(std::log(total));
  }
}
