// What a build with CUDA can say about itself and the machine.
#pragma once

#include <string>
#include <vector>

namespace rnnkernels::cuda {

struct Device {
  std::string name;
  int major;  // compute capability
  int minor;
};

struct Probe {
  std::string architectures;    // built for, as CMake names them: "80-real 90a-real"
  int runtime = 0;              // 1000 · major + 10 · minor, linked in
  int driver = 0;               // likewise; 0 without a driver
  std::vector<Device> devices;  // empty without a driver
};

// Never fails: where there is no driver or no device it says so by zero and by emptiness.
Probe probe();

}  // namespace rnnkernels::cuda
