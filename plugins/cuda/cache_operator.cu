// The cache operator on NVIDIA GPUs; `plugins/oracle.py` says what each operator computes.
//
// Follows element_types.cu in one translation unit. Layouts are dense and row-major: x [B, L, C],
// indices int64 [B, K] ascending, cached [B, T, C]. Sums are in fp32 and in a fixed order: the result does not depend on
// how blocks are scheduled. Arguments are inputs, sizes, outputs, as TensorRT passes them to a kernel inside an engine.

constexpr int kWarp = 32;
constexpr int kMeanRows = 16;
constexpr int kSelectThreads = 1024;
constexpr unsigned kFullMask = 0xffffffffu;

// mean [B, C] over the tokens. Grid (ceil(C / 32), B), block (32, 16).
template <typename T>
__device__ void token_mean(const T* x, int length, int channels, float* mean) {
    __shared__ float partial[kMeanRows][kWarp];
    const int c = blockIdx.x * kWarp + threadIdx.x;
    const T* rows = x + static_cast<long long>(blockIdx.y) * length * channels;
    float sum = 0.0f;
    if (c < channels) {
        for (int l = threadIdx.y; l < length; l += kMeanRows) {
            sum += to_float(rows[static_cast<long long>(l) * channels + c]);
        }
    }
    partial[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && c < channels) {
        float total = 0.0f;
        for (int i = 0; i < kMeanRows; ++i) {
            total += partial[i][threadIdx.x];
        }
        mean[static_cast<long long>(blockIdx.y) * channels + c] = total / length;
    }
}

// score [B, L] = ||x - mean||^2. One warp per token: grid ceil(B * L / 8), block (32, 8).
template <typename T>
__device__ void token_score(const T* x, const float* mean, int batch, int length, int channels, float* score) {
    const long long token = static_cast<long long>(blockIdx.x) * blockDim.y + threadIdx.y;
    if (token >= static_cast<long long>(batch) * length) {
        return;
    }
    const T* row = x + token * channels;
    const float* center = mean + token / length * channels;
    float sum = 0.0f;
    for (int c = threadIdx.x; c < channels; c += kWarp) {
        const float deviation = to_float(row[c]) - center[c];
        sum += deviation * deviation;
    }
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        sum += __shfl_down_sync(kFullMask, sum, offset);
    }
    if (threadIdx.x == 0) {
        score[token] = sum;
    }
}

// Exclusive count of `flag` over the block's threads; `total` gets the block's sum.
__device__ int block_rank(bool flag, int* warp_counts, int* total) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    const unsigned votes = __ballot_sync(kFullMask, flag);
    if (lane == 0) {
        warp_counts[warp] = __popc(votes);
    }
    __syncthreads();
    int before = 0, sum = 0;
    for (int i = 0; i < warps; ++i) {
        before += i < warp ? warp_counts[i] : 0;
        sum += warp_counts[i];
    }
    __syncthreads();
    *total = sum;
    return before + __popc(votes & ((1u << lane) - 1u));
}

// indices [B, K] of the K largest scores in ascending position, ties to the lower position. One block of 1024 per row.
// Scores are not negative, so their bits order as they do: the K-th largest is found byte by byte.
extern "C" __global__ void select_tokens(const float* scores, int length, int keep, long long* indices) {
    __shared__ unsigned histogram[256];
    __shared__ unsigned threshold;
    __shared__ int remaining;
    __shared__ int warp_counts[kSelectThreads / kWarp];
    const float* score = scores + static_cast<long long>(blockIdx.x) * length;
    long long* out = indices + static_cast<long long>(blockIdx.x) * keep;
    if (threadIdx.x == 0) {
        threshold = 0;
        remaining = keep;
    }
    unsigned mask = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        for (int i = threadIdx.x; i < 256; i += blockDim.x) {
            histogram[i] = 0;
        }
        __syncthreads();
        const unsigned prefix = threshold;
        for (int l = threadIdx.x; l < length; l += blockDim.x) {
            const unsigned key = __float_as_uint(score[l]);
            if ((key & mask) == prefix) {
                atomicAdd(&histogram[(key >> shift) & 255u], 1u);
            }
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            int bin = 255;
            while (bin > 0 && static_cast<int>(histogram[bin]) < remaining) {
                remaining -= histogram[bin];
                --bin;
            }
            threshold = prefix | (static_cast<unsigned>(bin) << shift);
        }
        mask |= 255u << shift;
        __syncthreads();
    }
    const unsigned limit = threshold;
    const int equal_to_take = remaining;
    int equal_before = 0, taken_before = 0;
    for (int start = 0; start < length; start += blockDim.x) {
        const int l = start + threadIdx.x;
        const unsigned key = l < length ? __float_as_uint(score[l]) : 0u;
        const bool equal = l < length && key == limit;
        int num_equal, num_taken;
        const int equal_rank = equal_before + block_rank(equal, warp_counts, &num_equal);
        const bool take = l < length && (key > limit || (equal && equal_rank < equal_to_take));
        const int rank = taken_before + block_rank(take, warp_counts, &num_taken);
        if (take) {
            out[rank] = l;
        }
        equal_before += num_equal;
        taken_before += num_taken;
    }
}

// out [B, K, C] = the rows of x at `indices`. Grid (K, B), block 128.
template <typename T>
__device__ void gather_tokens(const T* x, const long long* indices, int length, int keep, int channels, T* out) {
    const long long row = static_cast<long long>(blockIdx.y) * keep + blockIdx.x;
    const T* source = x + (static_cast<long long>(blockIdx.y) * length + indices[row]) * channels;
    for (int c = threadIdx.x; c < channels; c += blockDim.x) {
        out[row * channels + c] = source[c];
    }
}

// Where position l stands in the ascending indices, or -1.
__device__ int find_index(const long long* indices, int keep, int l) {
    int low = 0, high = keep;
    while (low < high) {
        const int middle = (low + high) / 2;
        if (indices[middle] < l) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low < keep && indices[low] == l ? low : -1;
}

// [B, h * w, C]: computed rows at `indices`, elsewhere the cache averaged over the area of each position; with a residual
// (fp32 [B, h * w, C]) added in fp32. Grid (h * w, B), block 128.
template <typename T, typename Out>
__device__ void restore_tokens(const T* computed, const long long* indices, const T* cached, const float* residual,
                               int keep, int channels, int h, int w, int cached_h, int cached_w, Out* out) {
    __shared__ int slot;
    const int l = blockIdx.x, b = blockIdx.y, length = h * w;
    if (threadIdx.x == 0) {
        slot = find_index(indices + static_cast<long long>(b) * keep, keep, l);
    }
    __syncthreads();
    const long long row = (static_cast<long long>(b) * length + l) * channels;
    const int i = l / w, j = l % w;
    const int top = i * cached_h / h, bottom = ((i + 1) * cached_h + h - 1) / h;
    const int left = j * cached_w / w, right = ((j + 1) * cached_w + w - 1) / w;
    const float weight = 1.0f / (bottom - top), column_weight = 1.0f / (right - left);
    for (int c = threadIdx.x; c < channels; c += blockDim.x) {
        T value;
        if (slot >= 0) {
            value = computed[(static_cast<long long>(b) * keep + slot) * channels + c];
        } else {
            float sum = 0.0f;
            for (int x = left; x < right; ++x) {
                float column = 0.0f;
                for (int y = top; y < bottom; ++y) {
                    const long long cell = (static_cast<long long>(b) * cached_h + y) * cached_w + x;
                    column += weight * to_float(cached[cell * channels + c]);
                }
                sum += column_weight * column;
            }
            value = from_float<T>(sum);
        }
        if (residual != nullptr) {
            out[row + c] = from_float<Out>(residual[row + c] + to_float(value));
        } else {
            out[row + c] = from_float<Out>(to_float(value));
        }
    }
}

#define FASTVAR_KERNELS(T, NAME)                                                                                       \
    extern "C" __global__ void token_mean_##NAME(const T* x, int length, int channels, float* mean) {                  \
        token_mean(x, length, channels, mean);                                                                         \
    }                                                                                                                  \
    extern "C" __global__ void token_score_##NAME(const T* x, const float* mean, int batch, int length, int channels,  \
                                                  float* score) {                                                      \
        token_score(x, mean, batch, length, channels, score);                                                          \
    }                                                                                                                  \
    extern "C" __global__ void gather_tokens_##NAME(const T* x, const long long* indices, int length, int keep,        \
                                                    int channels, T* out) {                                            \
        gather_tokens(x, indices, length, keep, channels, out);                                                        \
    }                                                                                                                  \
    extern "C" __global__ void restore_tokens_##NAME(const T* computed, const long long* indices, const T* cached,     \
                                                     int keep, int channels, int h, int w, int cached_h, int cached_w, \
                                                     T* out) {                                                         \
        const float* none = nullptr;                                                                                   \
        restore_tokens(computed, indices, cached, none, keep, channels, h, w, cached_h, cached_w, out);                \
    }                                                                                                                  \
    extern "C" __global__ void restore_tokens_add_##NAME(const T* computed, const long long* indices, const T* cached, \
                                                         const float* residual, int keep, int channels, int h, int w,  \
                                                         int cached_h, int cached_w, float* out) {                     \
        restore_tokens(computed, indices, cached, residual, keep, channels, h, w, cached_h, cached_w, out);            \
    }

FASTVAR_KERNELS(float, float32)
FASTVAR_KERNELS(half_t, float16)
FASTVAR_KERNELS(bfloat16_t, bfloat16)
