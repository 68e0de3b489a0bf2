// Room for what kernels keep while they run, and what a call says that there was none for.

#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <new>
#include <vector>

#include "vectors.h"

namespace dynamic_lora {

// Memory that begins at a cache line.
template <typename Element>
struct OnLines {
  using value_type = Element;
  static constexpr std::align_val_t kLine{kLineBytes};
  OnLines() = default;
  template <typename Other>
  OnLines(const OnLines<Other>&) {}
  Element* allocate(size_t count) {
    return static_cast<Element*>(::operator new(count * sizeof(Element), kLine));
  }
  void deallocate(Element* memory, size_t) { ::operator delete(memory, kLine); }
  bool operator==(const OnLines&) const { return true; }
  bool operator!=(const OnLines&) const { return false; }
};

template <typename Element>
using Lines = std::vector<Element, OnLines<Element>>;

template <typename Buffer>
void have_room(Buffer& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
}

// Whether there was memory for one call, for all threads of its team. No exception may leave a
// parallel region, nor a function that is called from outside C++.
class Memory {
 public:
  // Whether there was enough for `act`, which may stop half way where there was not.
  template <typename Act>
  bool suffices(const Act& act) {
    try {
      act();
      return true;
    } catch (const std::exception&) {  // std::bad_alloc, or std::length_error: beyond all memory
      ran_out_.store(true, std::memory_order_relaxed);
      return false;
    }
  }

  bool ran_out() const { return ran_out_.load(std::memory_order_relaxed); }

  // What a call returns.
  int64_t status() const { return ran_out(); }

  void begin() { ran_out_.store(false, std::memory_order_relaxed); }

 private:
  std::atomic<bool> ran_out_{false};
};

}  // namespace dynamic_lora
