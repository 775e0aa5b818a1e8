// Every cell there is: those of cells.def, and after them those that were compiled and loaded while the program runs.
#pragma once

#include <atomic>
#include <mutex>
#include <stdexcept>

#include "cells/list.h"

namespace rnnkernels {

constexpr int kMaxLoaded = 1024;

// Things by a loaded cell's number: written once, before the number is handed out, so that reading takes no lock.
template <class T>
class Loaded {
 public:
  const T* find(int cell) const {
    return cell < kCellCount || cell >= kCellCount + kMaxLoaded ? nullptr : things_[cell - kCellCount].load(std::memory_order_acquire);
  }
  void set(int cell, const T* thing) { things_[cell - kCellCount].store(thing, std::memory_order_release); }

 private:
  std::atomic<const T*> things_[kMaxLoaded] = {};
};

class Registry {
 public:
  const CellInfo* find(int cell) const { return cell >= 0 && cell < kCellCount ? &kCells[cell] : loaded_.find(cell); }
  const CellInfo& operator[](int cell) const { return *find(cell); }
  // The new cell's number. What is given must live as long as the program.
  int add(const CellInfo& cell) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (count_ == kCellCount + kMaxLoaded) throw std::length_error("more than 1024 cells were loaded");
    loaded_.set(count_, &cell);
    return count_++;
  }

 private:
  Loaded<CellInfo> loaded_;
  std::mutex mutex_;
  int count_ = kCellCount;
};

inline Registry registry;

}  // namespace rnnkernels
