// Items of work that several owners have some of each, numbered through.

#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace dynamic_lora {

// Finds whose an item is. Threads get items by ascending number, as a rule: the owners before are
// passed over once.
template <typename Owner, typename Count>
class Walk {
 public:
  // `count` says how many items an owner has.
  Walk(const std::vector<Owner>& owners, Count count) : owners_(&owners), count_(count) {
    for (const Owner& owner : owners) items_ += count(owner);
  }

  int64_t items() const { return items_; }

  // The owner, and which of its own items it is.
  std::pair<const Owner*, int64_t> find(int64_t item) {
    if (item < start_) start_ = 0, at_ = 0;
    for (int64_t own; item - start_ >= (own = count_((*owners_)[at_])); at_++) start_ += own;
    return {&(*owners_)[at_], item - start_};
  }

 private:
  const std::vector<Owner>* owners_;
  Count count_;
  int64_t items_ = 0, start_ = 0;  // the first of the items of the owner that was found last
  size_t at_ = 0;
};

}  // namespace dynamic_lora
