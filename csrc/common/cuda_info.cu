#include <cuda_runtime.h>

#include <string>
#include <vector>

namespace avfast {

// Returns "name (sm_XY)" for every device; nothing where there is no device or no driver.
std::vector<std::string> cuda_devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // the error would otherwise be reported by the next launch
    return {};
  }
  std::vector<std::string> devices;
  for (int i = 0; i < count; ++i) {
    cudaDeviceProp properties;
    if (cudaGetDeviceProperties(&properties, i) != cudaSuccess) continue;
    devices.push_back(std::string(properties.name) + " (sm_" + std::to_string(properties.major) +
                      std::to_string(properties.minor) + ")");
  }
  return devices;
}

}  // namespace avfast
