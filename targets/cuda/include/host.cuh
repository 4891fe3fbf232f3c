// The host side of an artifact: arguments by tvm-ffi's C interface, launches on the caller's stream. Nothing is allocated, copied to the host or waited for.
#pragma once
#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>

#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>

#ifdef TCOMPILE_SIMT
#define TC_DEVICE_TYPE kDLCPU
#define TC_BITS(type) (type.code == kDLBfloat)  // numpy has no such type: their bits do
#define TC_LAUNCH(kernel, grid, threads, shared, stream, ...) tc::simt::launch(kernel, grid, threads, shared, __VA_ARGS__)
#else
#define TC_DEVICE_TYPE kDLCUDA
#define TC_BITS(type) false
#define TC_LAUNCH(kernel, grid, threads, shared, stream, ...) kernel<<<grid, threads, shared, stream>>>(__VA_ARGS__)
#endif

namespace tc {

struct Expected {
  const char* name;
  DLDataType type;
  int dims;
  const int64_t* shape;
};

inline int fail(const char* format, ...) {
  char message[512];
  va_list rest;
  va_start(rest, format);
  vsnprintf(message, sizeof message, format, rest);
  va_end(rest);
  TVMFFIErrorSetRaisedFromCStr("RuntimeError", message);
  return -1;
}

inline const DLTensor* tensor(const TVMFFIAny& argument) {
  if (argument.type_index == kTVMFFIDLTensorPtr) return static_cast<const DLTensor*>(argument.v_ptr);
  if (argument.type_index == kTVMFFITensor) return TVMFFITensorGetDLTensorPtr(argument.v_obj);
  return nullptr;
}

// Fills `data` with the address of every argument; each has to be what is expected, compact, 16-byte aligned and on one device.
inline int bind(const TVMFFIAny* arguments, int count, const Expected* expected, int expected_count, char** data, int* device) {
  if (count != expected_count) return fail("expected %d tensors, got %d", expected_count, count);
  for (int i = 0; i < count; ++i) {
    const Expected& want = expected[i];
    const DLTensor* got = tensor(arguments[i]);
    if (!got) return fail("%s: expected a tensor", want.name);
    if (got->device.device_type != TC_DEVICE_TYPE) return fail("%s: expected a tensor on a CUDA device, got one on device type %d", want.name, (int)got->device.device_type);
    if (i && got->device.device_id != *device) return fail("%s: expected a tensor on device %d, got one on device %d", want.name, *device, got->device.device_id);
    *device = got->device.device_id;
    if ((got->dtype.code != want.type.code && !TC_BITS(want.type)) || got->dtype.bits != want.type.bits || got->dtype.lanes != 1)
      return fail("%s: expected elements of type code %d with %d bits, got code %d with %d bits", want.name, want.type.code, want.type.bits, got->dtype.code, got->dtype.bits);
    if (got->ndim != want.dims) return fail("%s: expected %d dims, got %d", want.name, want.dims, got->ndim);
    int64_t stride = 1;
    bool empty = false;  // a tensor without elements has any strides
    for (int d = 0; d < want.dims; ++d) empty = empty || want.shape[d] == 0;
    for (int d = want.dims - 1; d >= 0; --d) {
      if (got->shape[d] != want.shape[d]) return fail("%s: expected size %lld of dim %d, got %lld", want.name, (long long)want.shape[d], d, (long long)got->shape[d]);
      if (got->strides && !empty && got->shape[d] > 1 && got->strides[d] != stride) return fail("%s: expected a contiguous tensor", want.name);
      stride *= got->shape[d];
    }
    data[i] = static_cast<char*>(got->data) + got->byte_offset;
    if (!empty && reinterpret_cast<uintptr_t>(data[i]) % 16) return fail("%s: expected a tensor aligned to 16 bytes", want.name);
  }
  return 0;
}

// ---- open sizes: computed for every call --------------------------------------------------------------------------------------------------------------
using Wide = __int128;  // wide enough for any product of sizes
template <class T, class U> inline auto floor_quotient(T a, U b) { return b == 0 ? decltype(a + b)(0) : a / b - (a % b != 0 && (a % b < 0) != (b < 0)); }
template <class T, class U> inline auto floor_remainder(T a, U b) { return b == 0 ? decltype(a + b)(0) : a - floor_quotient(a, b) * b; }
template <class T, class U> inline auto lesser(T a, U b) { return a < b ? decltype(a + b)(a) : decltype(a + b)(b); }
template <class T, class U> inline auto greater(T a, U b) { return a > b ? decltype(a + b)(a) : decltype(a + b)(b); }
inline int64_t aligned(int64_t bytes, int64_t to) { return (bytes + to - 1) / to * to; }
inline int64_t most(std::initializer_list<int64_t> values) {
  int64_t found = 0;
  for (int64_t value : values) found = value > found ? value : found;
  return found;
}

// The inputs among the arguments, from `first` on.
inline int shapes(const TVMFFIAny* arguments, int count, int first, int expected_count, const char* const* names, const int* dims, int inputs, const DLTensor** found) {
  if (count != expected_count) return fail("expected %d tensors, got %d", expected_count, count);
  for (int i = 0; i < inputs; ++i) {
    found[i] = tensor(arguments[first + i]);
    if (!found[i]) return fail("%s: expected a tensor", names[i]);
    if (found[i]->ndim != dims[i]) return fail("%s: expected %d dims, got %d", names[i], dims[i], found[i]->ndim);
  }
  return 0;
}
inline int outside(const char* name, int dim, int64_t size, int64_t least, int64_t most) {
  if (size >= least && size <= most) return 0;
  if (most == INT64_MAX) return fail("%s: expected a size of dim %d of %lld or more, got %lld", name, dim, (long long)least, (long long)size);
  return fail("%s: expected a size of dim %d in %lld..%lld, got %lld", name, dim, (long long)least, (long long)most, (long long)size);
}
inline int differ(const char* what, int64_t found, int64_t wanted) { return found == wanted ? 0 : fail("%s is %lld, %lld is needed", what, (long long)found, (long long)wanted); }
inline int too_large(const Wide* sizes, int count) {
  for (int i = 0; i < count; ++i)
    if (sizes[i] > INT32_MAX || sizes[i] < -INT32_MAX) return fail("a tensor would have more than %d elements", INT32_MAX);
  return 0;
}
// Writes numbers into a tensor of the host.
inline int tell(const TVMFFIAny& argument, const int64_t* values, int count, TVMFFIAny* result) {
  const DLTensor* to = tensor(argument);
  if (!to || to->device.device_type != kDLCPU || to->dtype.code != kDLInt || to->dtype.bits != 64 || to->ndim != 1 || to->shape[0] != count)
    return fail("expected a tensor of %d numbers of 64 bits on the host", count);
  memcpy(static_cast<char*>(to->data) + to->byte_offset, values, count * sizeof(int64_t));
  result->type_index = kTVMFFINone;
  result->zero_padding = 0;
  result->v_int64 = 0;
  return 0;
}
// A grid of blocks; none where something is empty.
struct LaunchGrid {
  int status;
  bool any;
  dim3 grid;
  LaunchGrid(const char* kernel, int64_t x, int64_t y, int64_t z) : status(0), any(x > 0 && y > 0 && z > 0), grid((unsigned)x, (unsigned)y, (unsigned)z) {
    if (any && (x > INT32_MAX || y > 65535 || z > 65535)) status = fail("%s: a grid of %lld x %lld x %lld blocks", kernel, (long long)x, (long long)y, (long long)z);
  }
};
#define TC_LAUNCH_OPEN(kernel, x, y, z, threads, shared, stream, ...)                        \
  do {                                                                                       \
    const tc::LaunchGrid blocks(#kernel, x, y, z);                                               \
    if (blocks.status) return -1;                                                            \
    if (blocks.any) TC_LAUNCH(kernel, blocks.grid, threads, shared, stream, __VA_ARGS__);    \
  } while (0)

#ifdef TCOMPILE_SIMT
inline int check(int, const char*) { return 0; }
struct Device {
  cudaStream_t stream = nullptr;
  int status = 0;
  explicit Device(int) {}
};
inline int copy(void* to, const void* from, size_t bytes, cudaStream_t) { return memcpy(to, from, bytes), 0; }
inline int allow_shared(const void*, int) { return 0; }
inline int in_turns(int blocks, int) { return blocks; }
inline int encode(TensorMap& map, const void* data, uint64_t rows, uint64_t columns, uint32_t box) {
  if (reinterpret_cast<uintptr_t>(data) % 16 || columns % 4 || !rows || !columns || rows > UINT32_MAX || columns > UINT32_MAX || !box || box > 256) return fail("no tensor map has these sizes");
  map = {static_cast<const char*>(data), rows, columns, box};
  return 0;
}
inline int encode_heads(TensorMap& map, const void* data, uint64_t batch, uint64_t outer, uint64_t inner, uint64_t columns, uint32_t box_outer, uint32_t box_inner) {
  if (encode(map, data, batch * outer * inner, columns, box_outer * box_inner)) return -1;
  if (box_outer > 1 && box_inner > 1) return fail("no tensor map has these boxes");
  map.stack = {(int64_t)batch, (int64_t)outer, (int64_t)inner, box_outer > 1};
  return 0;
}
inline int encode_windows(TensorMap& map, const void* data, int n, int h, int w, int c, int box, int lower_w, int lower_h, int upper_w, int upper_h, int stride_w, int stride_h) {
  if (encode(map, data, (uint64_t)n * h * w, c, box)) return -1;
  for (int corner : {lower_w, lower_h, upper_w, upper_h})
    if (corner < -128 || corner > 127) return fail("no tensor map has these corners");
  if (stride_w > 8 || stride_h > 8 || w + upper_w <= lower_w || h + upper_h <= lower_h) return fail("no tensor map has these strides");
  map.image = {n, h, w, lower_w, lower_h, upper_w, upper_h, stride_w, stride_h};
  return 0;
}
#else
inline int check(cudaError_t error, const char* what) { return error == cudaSuccess ? 0 : fail("%s: %s", what, cudaGetErrorString(error)); }
// The device of the tensors while it lives, and the caller's stream there.
struct Device {
  int before = 0, status;
  cudaStream_t stream;
  explicit Device(int id) {
    status = check(cudaGetDevice(&before), "cudaGetDevice");
    if (!status && before != id) status = check(cudaSetDevice(id), "cudaSetDevice");
    stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(kDLCUDA, id));
  }
  ~Device() { cudaSetDevice(before); }
};
inline int copy(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  return check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream), "cudaMemcpyAsync");
}
inline int allow_shared(const void* kernel, int bytes) {
  return check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute");
}
// So many blocks, but no more than the device has multiprocessors: what the others would do later, these do in turns.
inline int in_turns(int blocks, int device) {
  int count = blocks;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count < blocks ? count : blocks;
}
// A function of the driver that makes tensor maps, looked up once; nothing is asked of the device.
inline void* driver_function(std::atomic<void*>& found, const char* name) {
  void* function = found.load();
  if (function) return function;
  cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(name, &function, cudaEnableDefault, &result);
#endif
  if (check(error, name)) return nullptr;
  if (result != cudaDriverEntryPointSuccess || !function) return fail("the driver has no %s: it is older than CUDA 12.0", name), nullptr;
  found.store(function);
  return function;
}
// The map of a tensor of words, the last dim first.
inline int encode_tiled(TensorMap& map, const void* data, int dims, const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* boxes) {
  static std::atomic<void*> found{nullptr};
  const auto make = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(driver_function(found, "cuTensorMapEncodeTiled"));
  if (!make) return -1;
  const cuuint32_t steps[] = {1, 1, 1, 1};
  const CUresult status = make(&map, CU_TENSOR_MAP_DATA_TYPE_INT32, dims, const_cast<void*>(data), sizes, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? 0 : fail("cuTensorMapEncodeTiled: error %d for %llu rows of %llu words", (int)status, (unsigned long long)sizes[1], (unsigned long long)sizes[0]);
}
// The map of a matrix of words, row-major, for copies of `box` rows of 32 words.
inline int encode(TensorMap& map, const void* data, uint64_t rows, uint64_t columns, uint32_t box) {
  const cuuint64_t sizes[] = {columns, rows}, strides[] = {columns * 4};
  const cuuint32_t boxes[] = {32, box};
  return encode_tiled(map, data, 2, sizes, strides, boxes);
}
// The map of a tensor [batch][outer][inner][columns] of words, rows and heads or heads and rows, for copies of 32 words of several rows of a head.
inline int encode_heads(TensorMap& map, const void* data, uint64_t batch, uint64_t outer, uint64_t inner, uint64_t columns, uint32_t box_outer, uint32_t box_inner) {
  const cuuint64_t sizes[] = {columns, inner, outer, batch}, strides[] = {columns * 4, columns * inner * 4, columns * inner * outer * 4};
  const cuuint32_t boxes[] = {32, box_inner, box_outer, 1};
  return encode_tiled(map, data, 4, sizes, strides, boxes);
}
// The map of an NHWC image of c words a pixel, for copies of `box` windows' pixels of 32 words. Bases of windows lie between the corners, which count from the first and from the last pixel.
inline int encode_windows(TensorMap& map, const void* data, int n, int h, int w, int c, int box, int lower_w, int lower_h, int upper_w, int upper_h, int stride_w, int stride_h) {
  static std::atomic<void*> found{nullptr};
  const auto make = reinterpret_cast<decltype(&cuTensorMapEncodeIm2col)>(driver_function(found, "cuTensorMapEncodeIm2col"));
  if (!make) return -1;
  const cuuint64_t pixel = (cuuint64_t)c * 4;
  const cuuint64_t sizes[] = {(cuuint64_t)c, (cuuint64_t)w, (cuuint64_t)h, (cuuint64_t)n}, strides[] = {pixel, pixel * w, pixel * w * h};
  const int lower[] = {lower_w, lower_h}, upper[] = {upper_w, upper_h};
  const cuuint32_t steps[] = {1, (cuuint32_t)stride_w, (cuuint32_t)stride_h, 1};
  const CUresult status = make(&map, CU_TENSOR_MAP_DATA_TYPE_INT32, 4, const_cast<void*>(data), sizes, strides, lower, upper, 32, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return status == CUDA_SUCCESS ? 0 : fail("cuTensorMapEncodeIm2col: error %d for an image of %d x %d x %d pixels of %d words", (int)status, n, h, w, c);
}
#endif

}  // namespace tc
