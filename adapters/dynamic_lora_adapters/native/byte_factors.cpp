// Rounds a projection's factors to eight bits, and lays them out; `byte_factors.h` says how.

#include "byte_factors.h"

#include <vector>

using namespace dynamic_lora;

namespace {

// Ranks of a row of b, from `first` on, and zeros behind the last.
Vec some_ranks(const float* row, int64_t first, int64_t ranks) {
  if (first + kLanes <= ranks) return load(row + first);
  Vec some{};
  std::memcpy(&some, row + first, (ranks - first) * sizeof(float));
  return some;
}

// To inverses [ranks], in whole vectors, what makes ranks of b [width, ranks] whole numbers up to 127.
void find_inverses(const float* b, int64_t width, int64_t ranks, float* inverses) {
  for (int64_t q = 0; q < ranks; q += kLanes) {
    Vec top{};
    for (int64_t c = 0; c < width; c++) {
      const Vec value = some_ranks(b + c * ranks, q, ranks), size = value < Vec{} ? -value : value;
      top = size > top ? size : top;
    }
    store(inverses + q, top > kNothing ? 127.0f / top : Vec{});
  }
}

// Rounds a row of b to whole numbers.
void round_row_of_b(const float* row, int64_t ranks, const float* inverses, int8_t* rounded) {
  for (int64_t q = 0; q < ranks; q += kLanes) {
    const Vec whole = (some_ranks(row, q, ranks) * load(inverses + q) + kMagic) - kMagic;
    store_lower(__builtin_convertvector(whole, IntVec), rounded + q);
  }
}

uint8_t added(int8_t whole) { return static_cast<uint8_t>(whole + kAdded); }

}  // namespace

// Writes a [ranks, in] and b [width, ranks] to ranks from `first` on of a place of so many `outs`,
// from `column` on. The place holds zeros: 128 in each byte, and no scales.
extern "C" int64_t dynamic_lora_write_bytes(const float* a, const float* b, uint8_t* place_a,
                                            uint8_t* place_b, const int64_t* sizes) {
  const int64_t ranks = sizes[0], in = sizes[1], width = sizes[2], first = sizes[3],
                column = sizes[4], outs = sizes[5];
  std::vector<float> inverses;
  std::vector<int8_t> rounded;
  Memory memory;
  const bool ready = memory.suffices([&] {
    inverses.resize(ranks + kLanes);
    rounded.resize(std::max(in, ranks) + kLanes);
  });
  if (!ready) return memory.status();
  find_inverses(b, width, ranks, inverses.data());
  for (int64_t q = 0; q < ranks; q++) {
    const int64_t rank = first + q, lane = rank % kByteRanks;
    uint8_t* tile = place_a + (rank - lane) * ByteTiles::inputs(in);
    uint8_t* factors = tile + kByteRanks * sizeof(float) + lane * 4;
    const float scale_of_a = round_group(a + q * in, in, rounded.data()).scale;
    const float scale = inverses[q] > 0 ? scale_of_a / inverses[q] : 0;
    std::memcpy(tile + lane * sizeof scale, &scale, sizeof scale);
    for (int64_t i = 0; i < in; i++)
      factors[i / 4 * 4 * kByteRanks + i % 4] = added(rounded[i]);
  }
  for (int64_t c = 0; c < width; c++) {
    const int64_t lane = (column + c) % kTileOuts;
    uint8_t* out = place_b + (column + c - lane) * kByteRanks + lane * 4;
    round_row_of_b(b + c * ranks, ranks, inverses.data(), rounded.data());
    for (int64_t q = 0; q < ranks; q++) {
      const int64_t rank = first + q, own = rank % kByteRanks;
      out[(rank - own) * tiled_outs(outs) + own / 4 * 4 * kTileOuts + own % 4] = added(rounded[q]);
    }
  }
  return memory.status();
}
