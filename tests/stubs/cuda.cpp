// CUDA libraries without a GPU: enough of them for ONNX Runtime's CUDA provider to load and to run. Memory is host
// memory, copies are made, kernels do nothing; what is launched and copied is counted, by name, apart from what is
// recorded while a stream is captured. Functions that are not here return 0 (`cuda_stubs.py` writes them).
//
// One source for all libraries: LIB_CUDART, LIB_CUBLAS, ... says which.

#include <cstdlib>
#include <cstring>

extern "C" void stub_count(const char* name);

#ifdef LIB_CUDART
#include <cuda_runtime_api.h>

#include <map>
#include <mutex>
#include <string>

namespace {
std::map<std::string, long> counts;
std::map<const void*, std::string> kernels;
std::mutex mutex;
bool counting = false;
bool capturing = false;
std::string text;

void* allocate(size_t bytes) { return aligned_alloc(256, (bytes + 511) / 256 * 256); }

cudaError_t launch(const void* kernel) {
    const auto found = kernels.find(kernel);
    stub_count(("kernel " + (found == kernels.end() ? "?" : found->second)).c_str());
    return cudaSuccess;
}

cudaError_t copy(void* target, const void* source, size_t bytes, cudaMemcpyKind kind) {
    static const char* names[] = {"copy host to host", "copy host to device", "copy device to host",
                                  "copy device to device", "copy"};
    stub_count(names[kind]);
    memcpy(target, source, bytes);
    return cudaSuccess;
}

template <typename Handle>
cudaError_t create(Handle* handle) {
    *handle = static_cast<Handle>(malloc(64));
    return cudaSuccess;
}
}  // namespace

extern "C" {
void stub_count(const char* name) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (counting) ++counts[(capturing ? "captured " : "") + std::string(name)];
}
void stub_start() {
    counts.clear();
    counting = true;
}
// Lines "count name".
const char* stub_stop() {
    counting = false;
    text.clear();
    for (const auto& [name, count] : counts) text += std::to_string(count) + " " + name + "\n";
    return text.c_str();
}

cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "stub");
    p->major = 9;
    p->multiProcessorCount = 132;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    p->sharedMemPerBlock = 48 << 10;
    p->sharedMemPerBlockOptin = 227 << 10;
    p->sharedMemPerMultiprocessor = 228 << 10;
    p->regsPerBlock = p->regsPerMultiprocessor = 64 << 10;
    p->totalGlobalMem = 80ull << 30;
    p->l2CacheSize = 50 << 20;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
        case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
        case cudaDevAttrMultiProcessorCount: *value = 132; break;
        case cudaDevAttrMaxSharedMemoryPerBlock:
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 227 << 10; break;
        default: *value = 1024;
    }
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) { return *free = *total = 80ull << 30, cudaSuccess; }

cudaError_t cudaMalloc(void** p, size_t bytes) {
    stub_count("cudaMalloc");
    return (*p = allocate(bytes)) ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaMallocFromPoolAsync(void** p, size_t bytes, cudaMemPool_t, cudaStream_t) { return cudaMalloc(p, bytes); }
cudaError_t cudaHostAlloc(void** p, size_t bytes, unsigned) { return *p = allocate(bytes), cudaSuccess; }
cudaError_t cudaMallocHost(void** p, size_t bytes) { return *p = allocate(bytes), cudaSuccess; }
cudaError_t cudaFree(void* p) { return free(p), cudaSuccess; }
cudaError_t cudaFreeHost(void* p) { return free(p), cudaSuccess; }
cudaError_t cudaFreeAsync(void* p, cudaStream_t) { return free(p), cudaSuccess; }

cudaError_t cudaMemcpy(void* d, const void* s, size_t n, cudaMemcpyKind kind) { return copy(d, s, n, kind); }
cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, cudaMemcpyKind kind, cudaStream_t) {
    return copy(d, s, n, kind);
}
cudaError_t cudaMemcpy2DAsync(void* d, size_t dp, const void* s, size_t sp, size_t width, size_t height,
                              cudaMemcpyKind kind, cudaStream_t) {
    for (size_t i = 0; i + 1 < height; ++i) {
        memcpy(static_cast<char*>(d) + i * dp, static_cast<const char*>(s) + i * sp, width);
    }
    const size_t last = height ? height - 1 : 0;
    return copy(static_cast<char*>(d) + last * dp, static_cast<const char*>(s) + last * sp, height ? width : 0, kind);
}
cudaError_t cudaMemcpyFromSymbol(void* d, const void*, size_t n, size_t, cudaMemcpyKind) {
    stub_count("copy from symbol to host or device");
    return memset(d, 0, n), cudaSuccess;
}
cudaError_t cudaMemset(void* d, int value, size_t n) { return memset(d, value, n), cudaSuccess; }
cudaError_t cudaMemsetAsync(void* d, int value, size_t n, cudaStream_t) {
    stub_count("memset");
    return memset(d, value, n), cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* p) { return create(p); }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* p, unsigned) { return create(p); }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { return *ms = 1, cudaSuccess; }
cudaError_t cudaStreamCreate(cudaStream_t* p) { return create(p); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* p, unsigned) { return create(p); }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
    *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
    stub_count("capture");
    return capturing = true, cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
    capturing = false;
    return create(graph);
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* graph, cudaGraph_t, unsigned long long) { return create(graph); }
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return stub_count("graph launch"), cudaSuccess; }
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) { return function(data), cudaSuccess; }

cudaError_t cudaLaunchKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t) { return launch(kernel); }
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t, cudaStream_t) {
    return launch(reinterpret_cast<const void*>(kernel));
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void* kernel, void**) { return launch(kernel); }
cudaError_t cudaLaunchCooperativeKernel(const void* kernel, dim3, dim3, void**, size_t, cudaStream_t) {
    return launch(kernel);
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
    return *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function)), cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    memset(attributes, 0, sizeof *attributes);
    attributes->maxThreadsPerBlock = 1024;
    attributes->binaryVersion = attributes->ptxVersion = 90;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*, int, size_t, unsigned) {
    return *count = 2, cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void*) {
    memset(attributes, 0, sizeof *attributes);
    attributes->type = cudaMemoryTypeDevice;
    return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
    *function = nullptr;
    if (result) *result = cudaDriverEntryPointSymbolNotFound;
    return cudaErrorUnknown;
}
cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) { return create(pool); }
cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* value) {
    return *static_cast<unsigned long long*>(value) = 0, cudaSuccess;
}
cudaError_t cudaLibraryGetKernel(cudaKernel_t* kernel, cudaLibrary_t, const char*) {
    return *kernel = nullptr, cudaSuccess;
}
cudaError_t cudaLibraryLoadData(cudaLibrary_t* library, const void*, cudaJitOption*, void**, unsigned,
                                cudaLibraryOption*, void**, unsigned) {
    return *library = nullptr, cudaSuccess;
}
const char* cudaGetErrorName(cudaError_t) { return "stub"; }
const char* cudaGetErrorString(cudaError_t) { return "stub"; }

unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = *block = dim3(1, 1, 1);
    *shared = 0;
    return *static_cast<void**>(stream) = nullptr, cudaSuccess;
}
void** __cudaRegisterFatBinary(void*) {
    static void* handle;
    return &handle;
}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
    kernels[host] = name ? name : "?";
}
}
#endif

#define CREATE(name) \
    int name(void** p) { return *p = malloc(256), 0; }

#define CREATE_KIND(name) \
    int name(int, void** p) { return *p = malloc(256), 0; }

#ifdef LIB_CUBLAS
extern "C" {
CREATE(cublasCreate_v2)
int cublasGetMathMode(void*, int* mode) { return *mode = 0, 0; }
const char* cublasGetStatusName(int) { return "stub"; }
const char* cublasGetStatusString(int) { return "stub"; }
}
#endif

#ifdef LIB_CUBLASLT
extern "C" {
CREATE(cublasLtCreate)
CREATE(cublasLtMatmulDescCreate)
CREATE(cublasLtMatmulPreferenceCreate)
CREATE(cublasLtMatrixLayoutCreate)
CREATE(cublasLtMatrixTransformDescCreate)
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* result, int* found) {
    memset(result, 0, 104);  // one cublasLtMatmulHeuristicResult_t
    return *found = 1, 0;
}
}
#endif

#ifdef LIB_CUDNN
extern "C" {
CREATE(cudnnCreate)
CREATE(cudnnCreateActivationDescriptor)
CREATE(cudnnCreateConvolutionDescriptor)
CREATE(cudnnCreateFilterDescriptor)
CREATE(cudnnCreateReduceTensorDescriptor)
CREATE(cudnnCreateTensorDescriptor)
size_t cudnnGetVersion() { return 91300; }
const char* cudnnGetErrorString(int) { return "stub"; }
const char* cudnnGetLastErrorString(char* text, size_t) { return text; }
int cudnnGetReductionIndicesSize(void*, void*, void*, void*, size_t* bytes) { return *bytes = 256, 0; }
int cudnnGetReductionWorkspaceSize(void*, void*, void*, void*, size_t* bytes) { return *bytes = 256, 0; }
CREATE_KIND(cudnnBackendCreateDescriptor)
// One engine for every operation: it needs no memory and has no notes.
int cudnnBackendGetAttribute(void*, int, int type, long requested, long* count, void* values) {
    const int kInt64 = 3, kDescriptor = 15, kInt32 = 23;
    const bool known = type == kInt64 || type == kDescriptor || type == kInt32;
    if (count) *count = known;
    if (values && requested && known && type != kDescriptor) memset(values, 0, type == kInt64 ? 8 : 4);
    return 0;
}
}
#endif
