// Stub of the CUDA runtime functions that PyTorch calls to detect a GPU. It reports one NVIDIA H200; kernel launches do
// nothing. benchmarks/fake_h200.py compiles and preloads it.
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

#define RETURN_SUCCESS \
  { return cudaSuccess; }

cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) RETURN_SUCCESS
cudaError_t cudaGetLastError(void) RETURN_SUCCESS
cudaError_t cudaPeekAtLastError(void) RETURN_SUCCESS
cudaError_t cudaDeviceSynchronize(void) RETURN_SUCCESS
cudaError_t cudaStreamSynchronize(cudaStream_t stream) RETURN_SUCCESS
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = *greatest = 0; return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
  *free_bytes = *total = 150754820096;
  return cudaSuccess;
}
cudaError_t cudaMalloc(void **pointer, size_t size) {
  *pointer = aligned_alloc(512, (size + 511) / 512 * 512);
  return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFree(void *pointer) { free(pointer); return cudaSuccess; }
cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  memcpy(dst, src, size);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *pointer, int value, size_t size, cudaStream_t stream) {
  memset(pointer, value, size);
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream) RETURN_SUCCESS
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  memset(p, 0, sizeof *p);  // from NVIDIA's data sheet and CUDA's table for compute capability 9.0
  strcpy(p->name, "NVIDIA H200");
  p->major = 9;
  p->multiProcessorCount = 132;
  p->warpSize = 32;
  p->totalGlobalMem = 150754820096;
  p->l2CacheSize = 62914560;
  p->memoryBusWidth = 6144;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->sharedMemPerBlock = 49152;
  p->sharedMemPerBlockOptin = 232448;
  p->sharedMemPerMultiprocessor = 233472;
  return cudaSuccess;
}
