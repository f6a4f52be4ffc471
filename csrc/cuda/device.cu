// Whether a device runs what was compiled into this library.
#include "launch.cuh"

namespace nfk {
namespace cuda {
namespace {

__global__ void nothing() {}

}  // namespace

std::string obstacle(int device) {
  const DeviceGuard guard(device);
  cudaError_t status = guard.status();
  cudaFuncAttributes attributes;
  if (status == cudaSuccess) status = cudaFuncGetAttributes(&attributes, nothing);
  if (status == cudaSuccess) return "";
  cudaGetLastError();  // or the next caller would see this error as its own
  return cudaGetErrorString(status);
}

}  // namespace cuda
}  // namespace nfk
