// Attention as calls of its own; `attention.h` has the kernels.

#include "attention.h"

using namespace dynamic_lora;

// Writes x [heads, tokens, dim] of new tokens to the table [cells, heads, dim].
// sizes: heads, tokens, dim; strides of x: head, token (in floats).
extern "C" void dynamic_lora_write(const float* x, float* table, const int64_t* cells,
                                   const int64_t* sizes) {
  const int64_t heads = sizes[0], tokens = sizes[1], dim = sizes[2];
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t h = 0; h < heads; h++)
      std::memcpy(table + (cells[t] * heads + h) * dim, x + h * sizes[3] + t * sizes[4],
                  dim * sizeof(float));
}

// items: [num_items][3], as `share_attention` has them.
// sizes: heads, kv_heads, dim, value_dim; strides of q: head, token (in floats).
extern "C" void dynamic_lora_attend(const float* q, const float* keys, const float* values,
                                    float* out, const float* sinks, const int64_t* items,
                                    int64_t num_items, const int64_t* sizes, float scaling,
                                    float softcap) {
  const Attention layer{q,        keys,     values,   out,      sinks,   sizes[4], sizes[5],
                        sizes[0], sizes[1], sizes[2], sizes[3], scaling, softcap};
#pragma omp parallel
  share_attention(layer, items, num_items);
}
