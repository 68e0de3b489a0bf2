// The base product as a call of its own, and the packing of weights; `product.h` has the kernels.

#include "product.h"

using namespace dynamic_lora;

namespace {

template <typename Weight, typename Place>
void pack(const Weight* weight, int64_t ldw, Weight* packed, int64_t n, int64_t k, int64_t depth,
          Place place) {
  const int64_t panels = (n + kWidth - 1) / kWidth;
#pragma omp parallel for schedule(guided, 1)
  for (int64_t j = 0; j < panels; j++)
    for (int64_t i = 0; i < depth; i++)
      for (int64_t c = 0; c < kWidth; c++) {
        const int64_t column = j * kWidth + c;
        packed[j * depth * kWidth + place(i, c)] =
            column < n && i < k ? weight[column * ldw + i] : Weight(0);
      }
}

}  // namespace

extern "C" {

int64_t dynamic_lora_panel_width() { return kWidth; }

// weight [n, k] with rows ldw apart; packed has room for n rounded up to whole panels and, in
// eight bits, k to an even number.
void dynamic_lora_pack(const float* weight, int64_t ldw, float* packed, int64_t n, int64_t k) {
  pack(weight, ldw, packed, n, k, k, [](int64_t i, int64_t c) { return i * kWidth + c; });
}

void dynamic_lora_pack_int8(const int8_t* weight, int64_t ldw, int8_t* packed, int64_t n,
                            int64_t k) {
  pack(weight, ldw, packed, n, k, even(k),
       [](int64_t i, int64_t c) { return i / 2 * 2 * kWidth + c * 2 + i % 2; });
}

// x [m, k], y [m, n], both dense.
void dynamic_lora_product(const Projection* projection, const float* x, float* y, int64_t m) {
  static thread_local Rounding own;
  Rounding& rounding = own;  // of this thread, for the whole team
  if (projection->scale) rounding.make_room(m, projection->k);
#pragma omp parallel
  share_product(x, *projection, nullptr, y, m, NoDeltas{}, Hints{}, rounding);
}

}  // extern "C"
