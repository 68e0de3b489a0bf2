// The base product as a call of its own, and the packing of weights; `product.h`
// and `product_inputs.h` have the kernels.

#include "kept_weight.h"
#include "product.h"
#include "team.h"

using namespace dynamic_lora;

namespace {

#if defined(__AVX2__)
// to [8, kWidth] = from [8, 8] transposed.
inline void transpose(const float* from, int64_t ld, float* to) {
  __m256 rows[8], pairs[8], fours[8];
  UNROLL
  for (int c = 0; c < 8; c++) rows[c] = _mm256_loadu_ps(from + c * ld);
  UNROLL
  for (int c = 0; c < 8; c += 2) {
    pairs[c] = _mm256_unpacklo_ps(rows[c], rows[c + 1]);
    pairs[c + 1] = _mm256_unpackhi_ps(rows[c], rows[c + 1]);
  }
  UNROLL
  for (int c = 0; c < 8; c += 4) {
    UNROLL
    for (int h = 0; h < 2; h++) {
      fours[c + 2 * h] = _mm256_shuffle_ps(pairs[c + h], pairs[c + h + 2], 0x44);
      fours[c + 2 * h + 1] = _mm256_shuffle_ps(pairs[c + h], pairs[c + h + 2], 0xee);
    }
  }
  UNROLL
  for (int i = 0; i < 4; i++) {
    _mm256_storeu_ps(to + i * kWidth, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * kWidth, _mm256_permute2f128_ps(fours[i], fours[i + 4], 0x31));
  }
}
#endif

// weight [width, count] to a panel's [count, kWidth].
void pack_block(const float* weight, int64_t ldw, int64_t width, int64_t count, float* panel) {
  int64_t whole = 0;
#if defined(__AVX2__)
  if (width == kWidth)
    for (; whole + 8 <= count; whole += 8)
      for (int64_t c = 0; c < kWidth; c += 8)
        transpose(weight + c * ldw + whole, ldw, panel + whole * kWidth + c);
#endif
  for (int64_t i = whole; i < count; i++)
    for (int64_t c = 0; c < kWidth; c++)
      panel[i * kWidth + c] = c < width ? weight[c * ldw + i] : 0.0f;
}

// Copies to a cache line's beginning. What is not read again soon need not be read before it is
// written, nor push other things out.
void write_past_caches(const void* from, int64_t bytes, void* to) {
#if defined(__AVX2__)
  for (int64_t i = 0; i < bytes; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(static_cast<char*>(to) + i),
                        _mm256_load_si256(reinterpret_cast<const __m256i*>(
                            static_cast<const char*>(from) + i)));
#else
  std::memcpy(to, from, bytes);
#endif
}

// Has what went past the caches arrive before another thread is told of it.
void wait_for_writes() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

constexpr int64_t kBlock = 96;     // inputs of a panel that are packed and added to at a time
constexpr int kFoldInputs = 6;     // of them in registers

// b^T a of a low-rank delta: a [rank, k], b [rank, n], with rows lda and ldb apart.
struct Factors {
  const float *a, *b;
  int64_t lda, ldb, rank;
};

// The rows of b [rank][kWidth] on a panel that are not all zero, and those of a that go with them.
struct PanelFactors {
  std::vector<float> b;
  std::vector<const float*> a;

  // Has room for so many.
  void reserve(int64_t rank) {
    b.reserve(rank * kWidth);
    a.reserve(rank);
  }

  void take(const Factors& factors, int64_t column, int64_t width) {
    b.clear();
    a.clear();
    for (int64_t r = 0; r < factors.rank; r++) {
      const float* row = factors.b + r * factors.ldb + column;
      if (std::all_of(row, row + width, [](float value) { return value == 0; })) continue;
      a.push_back(factors.a + r * factors.lda);
      b.insert(b.end(), row, row + width);
      b.resize(a.size() * kWidth);
    }
  }
};

// Inputs [kFoldInputs, kWidth] of a panel += b^T a. The delta is summed before it is added, as
// one who computes it apart does.
void add_to_some(const PanelFactors& factors, int64_t first, float* panel) {
  const int64_t rank = factors.a.size();
  const float* b = factors.b.data();
  Vec sums[kFoldInputs][kPanelVecs] = {};
  for (int64_t r = 0; r < rank; r++, b += kWidth) {
    const float* a = factors.a[r] + first;
    Vec outputs[kPanelVecs];
    UNROLL
    for (int v = 0; v < kPanelVecs; v++) outputs[v] = held(load(b + v * kLanes));
    UNROLL
    for (int t = 0; t < kFoldInputs; t++) {
      const Vec value = held(all(a[t]));
      UNROLL
      for (int v = 0; v < kPanelVecs; v++) sums[t][v] += value * outputs[v];
    }
  }
  UNROLL
  for (int t = 0; t < kFoldInputs; t++) {
    UNROLL
    for (int v = 0; v < kPanelVecs; v++) {
      float* place = panel + t * kWidth + v * kLanes;
      store(place, load(place) + sums[t][v]);
    }
  }
}

// The same for what is left of the inputs, one by one.
void add_to_one(const PanelFactors& factors, int64_t input, float* panel) {
  Vec sums[kPanelVecs] = {};
  for (size_t r = 0; r < factors.a.size(); r++) {
    UNROLL
    for (int v = 0; v < kPanelVecs; v++)
      sums[v] += factors.a[r][input] * load(factors.b.data() + r * kWidth + v * kLanes);
  }
  UNROLL
  for (int v = 0; v < kPanelVecs; v++)
    store(panel + v * kLanes, load(panel + v * kLanes) + sums[v]);
}

// The same for inputs first to first + count.
void add_factors(const PanelFactors& factors, int64_t first, int64_t count, float* panel) {
  if (factors.a.empty()) return;
  int64_t i = 0;
  for (; i + kFoldInputs <= count; i += kFoldInputs)
    add_to_some(factors, first + i, panel + i * kWidth);
  for (; i < count; i++) add_to_one(factors, first + i, panel + i * kWidth);
}

// Inputs [count, kWidth] of a panel where they belong in it: as they are, or rounded, in pairs.
void put_block(const float* block, int64_t count, float* to) {
  write_past_caches(block, count * kWidth * sizeof(float), to);
}

void put_block(const float* block, int64_t count, BFloat16* to) {
  alignas(64) BFloat16 rounded[kBlock * kWidth];
  for (int64_t i = 0; i < even(count); i += 2)
    for (int64_t c = 0; c < kWidth; c++) {
      const float* first = block + i * kWidth + c;
      rounded[i * kWidth + c * 2] = to_bfloat16(*first);
      rounded[i * kWidth + c * 2 + 1] = i + 1 < count ? to_bfloat16(first[kWidth]) : BFloat16{};
    }
  write_past_caches(rounded, even(count) * kWidth * sizeof(BFloat16), to);
}

// A weight + b^T a. See `Projection` for `halves`.
struct Folded {
  KeptWeight weight;
  bool halves;
  Factors factors;

  // Calls `act` (number, column, width, for_each_block) for each panel, on all threads; and that calls
  // its own `act` (block, first, count) with inputs [count, kWidth] of the panel, from `first` on.
  // Returns what `Memory` says; where that ran out, nothing was called.
  template <typename Act>
  int64_t for_each_panel(const Act& act) const {
    const int64_t n = weight.n, k = weight.k;
    Memory memory;
    Team team;
#pragma omp parallel
    {
      const Member member(team);
      PanelFactors on_panel;
      memory.suffices([&] { on_panel.reserve(factors.rank); });
      meet();
      const int64_t panels = memory.ran_out() ? 0 : (n + kWidth - 1) / kWidth;
#pragma omp for schedule(guided, 1) nowait
      for (int64_t j = 0; j < panels; j++) {
        const int64_t column = panel_column(j, n, halves);
        const int64_t width = std::min<int64_t>(kWidth, n - column);
        on_panel.take(factors, column, width);
        act(j, column, width, [&](const auto& take) {
          for (int64_t first = 0; first < k; first += kBlock) {
            alignas(64) float block[kBlock * kWidth], room[kBlock * kWidth];
            const int64_t count = std::min(kBlock, k - first);
            const WeightBlock rows = weight.block(column, width, first, count, room, kBlock);
            pack_block(rows.data, rows.stride, width, count, block);
            add_factors(on_panel, first, count, block);
            take(block, first, count);
          }
        });
      }
      wait_for_writes();
      meet();
    }
    return memory.status();
  }
};

// Packs a weight; a panel of `packed` has `depth` inputs. Returns what `Memory` says; where that ran
// out, nothing was written.
template <typename Weight>
int64_t pack(const Folded& folded, Weight* packed, int64_t depth) {
  return folded.for_each_panel([&](int64_t j, int64_t, int64_t, const auto& for_each_block) {
    for_each_block([&](const float* block, int64_t first, int64_t count) {
      put_block(block, count, packed + (j * depth + first) * kWidth);
    });
  });
}

// Of the outputs of a panel, how large weights are, and what makes them no numbers if one is none.
struct Largest {
  Vec tops[kPanelVecs] = {}, zeros[kPanelVecs] = {};

  // Looks at inputs [count, kWidth].
  void look(const float* block, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
      UNROLL
      for (int v = 0; v < kPanelVecs; v++) {
        const Vec value = load(block + i * kWidth + v * kLanes);
        const Vec size = value < Vec{} ? -value : value;
        tops[v] = size > tops[v] ? size : tops[v];
        zeros[v] += value * 0.0f;
      }
    }
  }

  // What weights of eight bits are multiples of: 127 of it are the largest. Of nothing but zeros it
  // is zero: sums of weights with something added are not zero to the bit.
  Vec scale(int v) const { return tops[v] / 127.0f + zeros[v]; }
};

// Inputs [count, kWidth] of a panel, and zeros up to `depth`, as bytes [depth / Together][kWidth]
// [Together], `added` to each.
template <int Together>
void put_bytes(const float* block, int64_t count, int64_t depth, int added, const Largest& largest,
               int8_t* to) {
  UNROLL
  for (int v = 0; v < kPanelVecs; v++) {
    const Vec scale = largest.scale(v), step = scale > Vec{} ? scale : all(1.0f);
    for (int64_t i = 0; i < depth; i += Together) {
      IntVec bytes{};
      UNROLL
      for (int j = 0; j < Together; j++) {
        Vec whole{};
        if (i + j < count)
          whole = (load(block + (i + j) * kWidth + v * kLanes) / step + kMagic) - kMagic;
        bytes |= ((__builtin_convertvector(whole, IntVec) + added) & 255) << 8 * j;
      }
      int8_t* place = to + i * kWidth + v * kLanes * Together;
      if constexpr (Together == 4)
        std::memcpy(place, &bytes, sizeof bytes);
      else
        store_lower(bytes, reinterpret_cast<int16_t*>(place));
    }
  }
}

// As `pack`, in eight bits, of which `Together` of an output lie side by side; scale [n] is what those
// of each output are multiples of. Without `packed`, scales alone are found.
template <int Together>
int64_t pack_bytes(const Folded& folded, int8_t* packed, float* scale, int64_t depth, int added) {
  static_assert(kBlock % Together == 0);
  return folded.for_each_panel([&](int64_t j, int64_t column, int64_t width,
                                   const auto& for_each_block) {
    // Twice through a panel, which stays near, rather than keep it: a base that is to be brought back
    // must not hang on memory.
    Largest largest;
    for_each_block([&](const float* block, int64_t, int64_t count) { largest.look(block, count); });
    for (int64_t c = 0; c < width; c++) scale[column + c] = largest.scale(c / kLanes)[c % kLanes];
    if (!packed) return;
    for_each_block([&](const float* block, int64_t first, int64_t count) {
      const int64_t whole = first + kBlock < folded.weight.k ? count : depth - first;
      put_bytes<Together>(block, count, whole, added, largest,
                          packed + (j * depth + first) * kWidth);
    });
  });
}

}  // namespace

extern "C" {

int64_t dynamic_lora_panel_width() { return kWidth; }

// Inputs that a panel of this format has room for.
int64_t dynamic_lora_panel_depth(int64_t format, int64_t k) {
  return panel_depth(static_cast<Format>(format), k);
}

// So many more, or fewer, want inputs whole from now on.
void dynamic_lora_keep_inputs_whole(int64_t more) { whole_inputs += more; }

// Whether inputs are rounded to bfloat16 beside weights in it.
int64_t dynamic_lora_rounds_to_bfloat16() { return pairs_pay(); }

// Whether inputs in eight bits are multiplied faster than any others, and whether twice as fast.
int64_t dynamic_lora_gains_by_eight_bits() {
  return (kMultipliesFours || kAddsTwos) && !kMatrixUnit;
}
int64_t dynamic_lora_doubles_by_eight_bits() { return kMultipliesFours && !kMatrixUnit; }

// Whether two neighbouring inputs in eight bits share these.
int64_t dynamic_lora_adds_twos() { return kAddsTwos; }

// weight [n, k], in parts, + b^T a; packed begins at a cache line and has room for n rounded up to
// whole panels. With a rank of 0, the weight alone. Returns what `Memory` says.
int64_t dynamic_lora_pack(const KeptRows* weight, float* packed, int64_t n, int64_t k,
                          int64_t halves, const float* a, int64_t lda, const float* b,
                          int64_t ldb, int64_t rank) {
  return pack(Folded{{weight, n, k}, halves != 0, {a, b, lda, ldb, rank}}, packed, k);
}

// The same, rounded to bfloat16.
int64_t dynamic_lora_pack_bfloat16(const KeptRows* weight, BFloat16* packed, int64_t n, int64_t k,
                                   int64_t halves, const float* a, int64_t lda, const float* b,
                                   int64_t ldb, int64_t rank) {
  return pack(Folded{{weight, n, k}, halves != 0, {a, b, lda, ldb, rank}}, packed, even(k));
}

// The same in eight bits; scale [n] is written, too.
int64_t dynamic_lora_pack_int8(const KeptRows* weight, int8_t* packed, float* scale, int64_t n,
                               int64_t k, int64_t halves, const float* a, int64_t lda,
                               const float* b, int64_t ldb, int64_t rank) {
  const Folded folded{{weight, n, k}, halves != 0, {a, b, lda, ldb, rank}};
  return pack_bytes<kBytesTogether>(folded, packed, scale, panel_depth(kBytes, k), 0);
}

// The same beside inputs in eight bits.
int64_t dynamic_lora_pack_w8a8(const KeptRows* weight, int8_t* packed, float* scale, int64_t n,
                               int64_t k, int64_t halves, const float* a, int64_t lda,
                               const float* b, int64_t ldb, int64_t rank) {
  const Folded folded{{weight, n, k}, halves != 0, {a, b, lda, ldb, rank}};
  return pack_bytes<4>(folded, packed, scale, panel_depth(kAllBytes, k), kAdded);
}

// x [m, k], y [m, n], both dense. Returns what `Memory` says.
int64_t dynamic_lora_product(const Projection* projection, const float* x, float* y, int64_t m) {
  static thread_local InputCopies own;
  InputCopies& copies = own;  // of this thread, for the whole team
  const Batch batch(m);
  Memory memory;
  if (!memory.suffices([&] { projection->make_room(batch, copies); })) return memory.status();
  Team team;
#pragma omp parallel
  {
    const Member member(team);
    share_copying(x, *projection, batch, copies);
    share_product(x, *projection, Plain{nullptr, y}, batch, NoDeltas{}, copies);
  }
  return memory.status();
}

}  // extern "C"
