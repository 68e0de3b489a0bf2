// Attention as calls of its own; `attention.h` has the kernels.

#include "attention.h"
#include "team.h"

using namespace dynamic_lora;

namespace {

template <typename Cached>
void write(const float* x, Cached* table, const int64_t* cells, const int64_t* sizes) {
  const int64_t heads = sizes[0], tokens = sizes[1], dim = sizes[2];
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t h = 0; h < heads; h++)
      keep(x + h * sizes[3] + t * sizes[4], dim, table + (cells[t] * heads + h) * dim);
}

template <typename Cached>
int64_t attend_all(const float* q, const void* keys, const void* values, float* out,
                   const float* sinks, const Item* items, int64_t num_items, const int64_t* sizes,
                   float scaling, float softcap) {
  const Attention<Cached> layer{q,        static_cast<const Cached*>(keys),
                                static_cast<const Cached*>(values),
                                out,      sinks,    sizes[4], sizes[5],
                                sizes[0], sizes[1], sizes[2], sizes[3], scaling, softcap};
  const auto nothing = [](int64_t) {};
  Claims claims;
  Memory memory;
  Team team;
#pragma omp parallel
  {
    const Member member(team);
    share_attention(layer, items, num_items, claims, memory, nothing, nothing);
  }
  return memory.status();
}

}  // namespace

extern "C" {

// Writes x [heads, tokens, dim] of new tokens to the table [cells, heads, dim], of floats or, where
// `in_bfloat16` says so, in bfloat16.
// sizes: heads, tokens, dim; strides of x: head, token (in floats).
void dynamic_lora_write(const float* x, void* table, const int64_t* cells, const int64_t* sizes,
                        int64_t in_bfloat16) {
  if (in_bfloat16)
    write(x, static_cast<BFloat16*>(table), cells, sizes);
  else
    write(x, static_cast<float*>(table), cells, sizes);
}

// Keys and values as in dynamic_lora_write.
// sizes: heads, kv_heads, dim, value_dim; strides of q: head, token (in floats).
// Returns what `Memory` says, as all do that need some.
int64_t dynamic_lora_attend(const float* q, const void* keys, const void* values, float* out,
                            const float* sinks, const Item* items, int64_t num_items,
                            const int64_t* sizes, float scaling, float softcap,
                            int64_t in_bfloat16) {
  const auto attend = in_bfloat16 ? attend_all<BFloat16> : attend_all<float>;
  return attend(q, keys, values, out, sinks, items, num_items, sizes, scaling, softcap);
}

}  // extern "C"
