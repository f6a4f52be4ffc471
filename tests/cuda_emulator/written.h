// The set of bytes that a launch has written.
#pragma once

#include <array>
#include <cstdint>
#include <unordered_map>

namespace emulator {

class WrittenBytes {
 public:
  // Of an access at a multiple of its size, 1 to 16 bytes.
  bool any(uintptr_t address, size_t bytes) const {
    const auto page = pages_.find(address / kPage);
    return page != pages_.end() && (page->second[word(address)] & bits(address, bytes));
  }
  void add(uintptr_t address, size_t bytes) { pages_[address / kPage][word(address)] |= bits(address, bytes); }
  void clear() { pages_.clear(); }

 private:
  static constexpr uintptr_t kPage = 4096, kWord = 64;

  static size_t word(uintptr_t address) { return address % kPage / kWord; }
  static uint64_t bits(uintptr_t address, size_t bytes) { return ((uint64_t{1} << bytes) - 1) << address % kWord; }

  std::unordered_map<uintptr_t, std::array<uint64_t, kPage / kWord>> pages_;  // a bit per byte
};

}  // namespace emulator
