// The kernels on CPUs: plain C ABI, OpenMP, no torch. cpu.py calls them; reference.py defines what they compute.
//
// The build compiles this file once per instruction set, SYNCNORM_ISA, into one library; all but the exported functions
// have internal linkage, so that no code of a wider instruction set stands in for that of a narrower one. For the same
// reason nothing of the C++ library is used.
//
// Memory: a dense tensor (N, C, *) with S trailing values is walked in one of two ways.
//
//     by plane    [N, C, S] with S >= 16: runs of one channel
//     by period   [N, *, C], or [N, C, S] with a small S: the channels of one row repeat all along the memory, so a row,
//                 or several short ones, are a period of values of which each has a channel of its own
//
// Either way the memory falls into segments of up to SEGMENT values, small enough for the first cache: what is written
// past the caches is gathered there. T is the type in memory, R the type of the arithmetic: float, or double for double.
// M is that of the segments which a pass reads and writes: T, whose values it converts in registers, or R, to and from
// which they are converted in buffers. Per channel everything comes and goes as double.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
static int omp_get_num_threads() { return 1; }
#endif

#define JOIN(a, b, c) a##b##c
#define NAME(prefix, isa, function) JOIN(prefix, isa, _##function)
#define EXPORT(function) \
    extern "C" __attribute__((visibility("default"))) int NAME(syncnorm_, SYNCNORM_ISA, function)
#define SIMD _Pragma("omp simd")

namespace {

constexpr int64_t SEGMENT = 1024;         // values
constexpr int64_t WRITTEN = 256;          // values: a segment of a pass that writes, which is to read meanwhile
constexpr int64_t GROUP = 8192;           // values: the memory is walked backwards by runs of as many
constexpr int64_t SMALLEST_PLANE = 16;    // values: smaller planes are walked by period
constexpr int64_t SMALLEST_PERIOD = 512;  // values: shorter rows are taken several at a time
constexpr int64_t ROWS_IN_SINGLE = 32;    // periods that are summed in R before they go to double
constexpr int ROWS_AT_A_TIME = 4;         // periods that are summed together
constexpr int64_t LINE = 64;              // bytes
constexpr int64_t AHEAD = 1024;           // bytes: so far ahead of the sums their values are fetched
constexpr int64_t VALUES_PER_THREAD = 32768;
constexpr int64_t STREAMED = 4 << 20;     // bytes: a larger result is written past the caches
constexpr int64_t FIRST_VALUES = 8;       // of a channel, for the first estimate of its mean
constexpr double CANCELLATION = 8;        // square of the shift's error over the variance that is summed anew

enum Dtype : int64_t { FLOAT32, FLOAT64, BFLOAT16, FLOAT16 };
enum Activation : int64_t { NONE, RELU, LEAKY_RELU, SILU, GELU_TANH };
constexpr double NEGATIVE_SLOPE = 0.01;
constexpr double LEAST_NOISE = 0x1p-126;  // times invstd: float holds the inverse of what is not below it

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };
template <class T> struct Arithmetic { using type = float; };
template <> struct Arithmetic<double> { using type = double; };
template <class T> struct InRegisters { using type = T; };
template <> struct InRegisters<fp16> { using type = float; };  // no compiler vectorizes a loop with its conversions

template <class T> struct Precision;  // the step from 1 to the next number, and the smallest number of full precision
template <> struct Precision<float> { static constexpr double eps = 0x1p-23, tiny = 0x1p-126; };
template <> struct Precision<double> { static constexpr double eps = 0x1p-52, tiny = 0x1p-1022; };
template <> struct Precision<bf16> { static constexpr double eps = 0x1p-7, tiny = 0x1p-126; };
template <> struct Precision<fp16> { static constexpr double eps = 0x1p-10, tiny = 0x1p-14; };

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// ---------------------------------------------------------------------------------------------- arguments, from cpu.py

struct Shape {
    int64_t n, c, s, channels_last, dtype, threads;
    int64_t values() const { return n * c * s; }
};

struct Parameters {  // of the layer: (C,) each, or null
    const void *weight, *bias;
    int64_t dtype;
};

struct Epilogue {
    int64_t activation;
    const void *residual;  // like x, or null
    uint8_t *signs;        // (ceil(values / 8),) or null
    int64_t inplace;       // x is y
};

struct MomentsArguments {
    Shape shape;
    const void *x;
    const void *mask;  // (N, S) in the type of the arithmetic, or null
    double *moments;   // (2C + 1,)
};

struct NormalizeArguments {
    Shape shape;
    const void *x;
    void *y;
    const double *moments;  // (2C + 1,)
    Parameters parameters;
    double eps;
    int64_t eps_outside;
    Epilogue epilogue;
    double *statistics;  // (2C + 1,)
};

struct BackwardArguments {  // what both passes of the backward read
    Shape shape;
    const void *dy, *x;
    const double *statistics;  // (2C + 1,)
    Parameters parameters;
    Epilogue epilogue;
    const void *mask;
};

struct ReduceGradArguments {
    BackwardArguments of;
    int64_t dtype;  // of the next two
    void *grad_weight, *grad_bias;  // (C,)
    double *sums;  // (2, C)
};

struct GradInputArguments {
    BackwardArguments of;
    const double *sums;  // (2, C), or null
    int64_t centered;
    double eps_outside;
    void *dx;
    void *dz;  // like x, or null
};

struct UpdateArguments {
    void *mean, *var;
    int64_t dtype;  // of these two
    int64_t *batches;  // or null
    const double *moments;
    int64_t c, cumulative;
    double momentum;
};

struct PackArguments {
    double *values;  // (2C + 1,)
    int64_t c;
};

// ------------------------------------------------------------------------------------------------------------- memory

class Scratch {  // for one call, cut into arrays
  public:
    explicit Scratch(int64_t bytes) : start_(static_cast<char *>(aligned_alloc(64, rounded(bytes) + 64))), next_(start_) {}
    ~Scratch() { free(start_); }
    Scratch(const Scratch &) = delete;
    template <class T> T *array(int64_t size) {
        T *array = reinterpret_cast<T *>(next_);
        next_ += bytes<T>(size);
        return array;
    }
    template <class T> static int64_t bytes(int64_t size) { return rounded(size * static_cast<int64_t>(sizeof(T))); }
    explicit operator bool() const { return start_; }

  private:
    static int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }
    char *start_, *next_;
};

inline float single(bf16 value) {
    uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    memcpy(&result, &bits, 4);
    return result;
}

inline bf16 to_bf16(float value) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return {static_cast<uint16_t>(value != value ? 0x7fc0 : rounded)};
}

#if !defined(__F16C__) && !defined(__ARM_FP16_FORMAT_IEEE)
inline float single(fp16 value) {
    uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16, rest = value.bits & 0x7fff;
    uint32_t bits = (rest << 13) + 0x38000000;  // the exponent's bias: 127 instead of 15
    if (rest >= 0x7c00) bits = 0x7f800000 | (rest & 0x3ff) << 13;
    float result;
    if (rest < 0x400) {  // subnormal
        result = static_cast<float>(rest) * 0x1p-24f;
        memcpy(&bits, &result, 4);
    }
    bits |= sign;
    memcpy(&result, &bits, 4);
    return result;
}

inline fp16 to_fp16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
    if (bits >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65520 and more
    if (bits < 0x38800000) {  // below 2^-14: in steps of 2^-24, which adding 1/2 rounds to
        float magnitude;
        memcpy(&magnitude, &bits, 4);
        magnitude += 0.5f;
        memcpy(&bits, &magnitude, 4);
        return {static_cast<uint16_t>(sign | (bits - 0x3f000000))};
    }
    bits += 0xfff + ((bits >> 13) & 1);
    return {static_cast<uint16_t>(sign | (bits - 0x38000000) >> 13)};
}
#endif

// A value of a segment in the type of the arithmetic, and back: in registers, where the loop around is vectorized.
inline float read(float from) { return from; }
inline double read(double from) { return from; }
inline float read(bf16 from) { return single(from); }
inline void write(float value, float *to) { *to = value; }
inline void write(double value, double *to) { *to = value; }
inline void write(float value, bf16 *to) { *to = to_bf16(value); }

// load(from, buffer, n): n values in the type of the buffer, in the buffer if they are not so already.
template <class M> const M *load(const M *from, M *, int64_t) { return from; }

inline const float *load(const bf16 *from, float *buffer, int64_t n) {
    SIMD for (int64_t i = 0; i < n; ++i) buffer[i] = single(from[i]);
    return buffer;
}

inline const float *load(const fp16 *from, float *buffer, int64_t n) {
#if defined(__F16C__)
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i))));
    for (; i < n; ++i) buffer[i] = _cvtsh_ss(from[i].bits);
#elif defined(__ARM_FP16_FORMAT_IEEE)
    for (int64_t i = 0; i < n; ++i) buffer[i] = reinterpret_cast<const __fp16 *>(from)[i];
#else
    for (int64_t i = 0; i < n; ++i) buffer[i] = single(from[i]);
#endif
    return buffer;
}

inline void convert(const float *from, bf16 *to, int64_t n) {
    SIMD for (int64_t i = 0; i < n; ++i) to[i] = to_bf16(from[i]);
}

inline void convert(const float *from, fp16 *to, int64_t n) {
#if defined(__F16C__)
    int64_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i *>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
    for (; i < n; ++i) to[i].bits = _cvtss_sh(from[i], 0);
#elif defined(__ARM_FP16_FORMAT_IEEE)
    for (int64_t i = 0; i < n; ++i) reinterpret_cast<__fp16 *>(to)[i] = static_cast<__fp16>(from[i]);
#else
    for (int64_t i = 0; i < n; ++i) to[i] = to_fp16(from[i]);
#endif
}

// Copy past the caches: lines that are written whole need not be read before, and evict nothing.
inline void stream(const void *from, void *to, int64_t bytes) {
#if defined(__x86_64__)
    const char *source = static_cast<const char *>(from);
    char *target = static_cast<char *>(to);
    int64_t head = smaller((64 - reinterpret_cast<intptr_t>(target) % 64) % 64, bytes);
    memcpy(target, source, head);
    source += head, target += head, bytes -= head;
    for (; bytes >= 64; source += 64, target += 64, bytes -= 64) {
#if defined(__AVX512F__)
        _mm512_stream_si512(reinterpret_cast<__m512i *>(target), _mm512_loadu_si512(source));
#else
        for (int part = 0; part < 64; part += 16)
            _mm_stream_si128(reinterpret_cast<__m128i *>(target + part),
                             _mm_loadu_si128(reinterpret_cast<const __m128i *>(source + part)));
#endif
    }
    memcpy(target, source, bytes);
#else
    memcpy(to, from, bytes);
#endif
}

struct Fence {  // at its end, what was streamed is there for all threads
    ~Fence() {
#if defined(__x86_64__)
        _mm_sfence();
#endif
    }
};

// Whether a result is better written past the caches: a large one is. But the pages of memory that was never touched are
// cleared at the first access, which brings them into the caches anyhow; to stream there would move them twice.
inline bool streams_to(const void *memory, int64_t bytes) {
    if (bytes <= STREAMED) return false;
#if defined(__linux__)
    const int64_t page = sysconf(_SC_PAGESIZE);
    for (int64_t part = 1; part < 4; ++part) {
        intptr_t there = (reinterpret_cast<intptr_t>(memory) + bytes / 4 * part) / page * page;
        unsigned char resident = 1;
        if (mincore(reinterpret_cast<void *>(there), page, &resident) == 0 && !(resident & 1)) return false;
    }
#endif
    return true;
}

// Where the segments of a result are computed, and how they get to their place: at once, or, past the caches, together.
// These go as soon as they end with a line, since a line that is streamed in two parts is read and written twice.
template <class T, class M> class Result {
  public:
    Result(void *memory, bool streams, M *buffer)  // buffer: 2 SEGMENT
        : memory_(static_cast<T *>(memory)), streams_(streams), buffer_(buffer),
          converted_(reinterpret_cast<T *>(buffer + SEGMENT)) {}
    ~Result() { flush(); }

    M *place(int64_t at, int64_t n) {
        if (!streams_) {
            if constexpr (same) return memory_ + at;
            return buffer_;
        }
        if (at != at_ + filled_ || filled_ + n > SEGMENT) {
            flush();
            at_ = at;
        }
        return buffer_ + filled_;
    }
    void put(int64_t at, int64_t n) {
        if (streams_) {
            filled_ += n;
            if (filled_ >= WRITTEN && ends_line(memory_ + at + n)) flush();
        }
        if constexpr (!same)
            if (!streams_) convert(buffer_, memory_ + at, n);
    }

  private:
    static constexpr bool same = sizeof(T) == sizeof(M);
    static bool ends_line(const T *end) { return reinterpret_cast<uintptr_t>(end) % LINE == 0; }
    void flush() {
        if (!filled_) return;
        const void *from = buffer_;
        if constexpr (!same) {
            convert(buffer_, converted_, filled_);
            from = converted_;
        }
        stream(from, memory_ + at_, filled_ * static_cast<int64_t>(sizeof(T)));
        filled_ = 0;
    }
    T *memory_;
    bool streams_;
    M *buffer_;
    T *converted_;
    int64_t at_ = 0, filled_ = 0;
};

// --------------------------------------------------------------------------------------------------------------- walk

struct Walk {
    int64_t values, plane, period, channels;
    bool by_period, repeats;  // repeats: the channel of place v in a period is v % C, else v / S % C
    int64_t threads, quantum;  // threads begin at multiples of quantum: planes' values, or periods

    Walk(const Shape &shape, bool has_signs)
        : values(shape.values()), plane(shape.s), period(0), channels(shape.c),
          by_period(shape.channels_last || shape.s < SMALLEST_PLANE), repeats(shape.channels_last || shape.s == 1) {
        if (by_period) {
            int64_t row = repeats ? shape.c : shape.c * shape.s;
            int64_t rows = row >= SMALLEST_PERIOD ? 1 : (SMALLEST_PERIOD + row - 1) / larger(row, 1);
            period = row * rows;
        }
        threads = larger(1, smaller(shape.threads, values / VALUES_PER_THREAD));
        quantum = by_period ? (has_signs && period % 8 ? 8 : 1) : 64;  // no two threads share a byte of signs
    }
    int64_t entries() const { return by_period ? period : channels; }  // of an array with a value per channel
    int64_t channel(int64_t entry) const { return !by_period ? entry : repeats ? entry % channels : entry / plane % channels; }
    int64_t units() const { return by_period ? (values + period - 1) / period : values; }
    int64_t begin(int64_t thread) const {
        return thread == threads ? units() : units() * thread / threads / quantum * quantum;
    }

    // Call segment(at, entry, n): n values from place `at` on, the first of which belongs to `entry`.
    template <class Segment> void planes(int64_t thread, Segment segment) const {
        int64_t first = begin(thread), last = begin(thread + 1);
        if (first < last) planes(first / plane, (last - 1) / plane + 1, first, last, SEGMENT, segment);
    }
    // Call segment(at, entry, n, rows): the same n values of some periods, `together` of them or 1.
    template <class Segment> void periods(int64_t thread, int64_t together, Segment segment) const {
        int64_t last = begin(thread + 1), whole = smaller(last, values / period), rows;
        for (int64_t row = begin(thread); row < last; row += rows) {
            rows = row + together <= whole ? together : 1;
            one_period(row, SEGMENT, [&](int64_t at, int64_t entry, int64_t n) { segment(at, entry, n, rows); });
        }
    }
    // Backwards, what the last pass has left in the caches is met first; for passes that write.
    template <class Segment> void backward(int64_t thread, Segment segment) const {
        int64_t first = begin(thread), last = begin(thread + 1);
        if (by_period) {
            in_groups_from_last(first, last, period, [&](int64_t from, int64_t to) {
                for (int64_t row = from; row < to; ++row) one_period(row, WRITTEN, segment);
            });
        } else if (first < last) {
            in_groups_from_last(first / plane, (last - 1) / plane + 1, plane,
                                [&](int64_t from, int64_t to) { planes(from, to, first, last, WRITTEN, segment); });
        }
    }

  private:
    // The last group of units first, but its units in order: together they are a run of memory.
    template <class Group> static void in_groups_from_last(int64_t first, int64_t last, int64_t size, Group group) {
        int64_t units = larger(1, GROUP / size);
        for (int64_t end = last; end > first; end -= units) group(larger(end - units, first), end);
    }
    template <class Segment> void one_period(int64_t row, int64_t longest, Segment segment) const {
        int64_t at = row * period, end = smaller(at + period, values);
        for (int64_t entry = 0; at < end; at += longest, entry += longest)
            segment(at, entry, smaller(longest, end - at));
    }
    // What lies between the values `first` and `last` of the planes `from` to `to`.
    template <class Segment>
    void planes(int64_t from, int64_t to, int64_t first, int64_t last, int64_t longest, Segment segment) const {
        int64_t channel = from % channels;
        for (int64_t p = from; p < to; ++p) {
            int64_t at = larger(p * plane, first), end = smaller((p + 1) * plane, last);
            for (; at < end; at += longest) segment(at, channel, smaller(longest, end - at));
            if (++channel == channels) channel = 0;  // to divide takes longer than to sum a small plane
        }
    }
};

template <class Work> void in_parallel(int64_t threads, Work work) {
    if (threads == 1) return work(0);
#pragma omp parallel num_threads(threads)
    for (int64_t thread = omp_get_thread_num(); thread < threads; thread += omp_get_num_threads()) work(thread);
}

// Give the entries of a period the values of their channels.
template <class R> void expand(const Walk &walk, const double *of_channel, R *of_entry) {
    int64_t channels = walk.channels, entries = walk.entries();
    SIMD for (int64_t c = 0; c < smaller(channels, entries); ++c) of_entry[c] = static_cast<R>(of_channel[c]);
    if (!walk.by_period) return;
    if (walk.repeats) {
        for (int64_t e = channels; e < entries; ++e) of_entry[e] = of_entry[e - channels];
        return;
    }
    for (int64_t e = 0, c = 0; e < entries; ++c, c = c == channels ? 0 : c)
        for (int64_t s = 0; s < walk.plane; ++s) of_entry[e++] = static_cast<R>(of_channel[c]);
}

template <class P> void parameter(const P *from, int64_t channels, double *to) {
    for (int64_t c = 0; c < channels; ++c) {
        if constexpr (sizeof(P) == 2) {
            float buffer;
            to[c] = *load(from + c, &buffer, 1);
        } else {
            to[c] = from[c];
        }
    }
}

inline void parameter(const void *from, int64_t dtype, int64_t channels, double otherwise, double *to) {
    if (!from)
        for (int64_t c = 0; c < channels; ++c) to[c] = otherwise;
    else if (dtype == FLOAT32)
        parameter(static_cast<const float *>(from), channels, to);
    else if (dtype == FLOAT64)
        parameter(static_cast<const double *>(from), channels, to);
    else if (dtype == BFLOAT16)
        parameter(static_cast<const bf16 *>(from), channels, to);
    else
        parameter(static_cast<const fp16 *>(from), channels, to);
}

inline void to_parameter(const double *from, int64_t dtype, int64_t channels, void *to) {
    for (int64_t c = 0; c < channels; ++c) {
        float single_value = static_cast<float>(from[c]);
        if (dtype == FLOAT32) static_cast<float *>(to)[c] = single_value;
        else if (dtype == FLOAT64) static_cast<double *>(to)[c] = from[c];
        else if (dtype == BFLOAT16) static_cast<bf16 *>(to)[c] = to_bf16(single_value);
        else convert(&single_value, static_cast<fp16 *>(to) + c, 1);
    }
}

// The mask of a segment: a weight for each of its values.
template <class R> const R *weights(const R *mask, const Walk &walk, int64_t at, int64_t n, R *buffer) {
    if (!walk.by_period) return mask + at / (walk.plane * walk.channels) * walk.plane + at % walk.plane;
    if (walk.repeats) {  // at = position * C + channel
        int64_t position = at / walk.channels, channel = at % walk.channels;
        for (int64_t i = 0; i < n; ++position, channel = 0)
            for (; i < n && channel < walk.channels; ++channel) buffer[i++] = mask[position];
        return buffer;
    }
    for (int64_t i = 0; i < n; ++i)
        buffer[i] = mask[(at + i) / (walk.plane * walk.channels) * walk.plane + (at + i) % walk.plane];
    return buffer;
}

// --------------------------------------------------------------------------------------------------------------- signs

inline unsigned eight_signs(const float *z) {  // bit k: z[k] > 0
#if defined(__AVX__)
    return _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(z), _mm256_setzero_ps(), _CMP_GT_OQ));
#else
    unsigned signs = 0;
    for (int k = 0; k < 8; ++k) signs |= static_cast<unsigned>(z[k] > 0) << k;
    return signs;
#endif
}

inline unsigned eight_signs(const double *z) {
    unsigned signs = 0;
    for (int k = 0; k < 8; ++k) signs |= static_cast<unsigned>(z[k] > 0) << k;
    return signs;
}

// Bit i % 8 of byte i / 8 is the sign of value i; eight of them may begin at any bit.
template <class R> void write_signs(const R *z, uint8_t *bits, int64_t at, int64_t n) {  // bits are 0 before
    uint8_t *byte = bits + at / 8;
    unsigned bit = static_cast<unsigned>(at % 8);
    int64_t i = 0;
    if (bit == 0) {
        for (; i + 8 <= n; i += 8) *byte++ = static_cast<uint8_t>(eight_signs(z + i));
    } else {
        for (; i + 8 <= n; i += 8) {
            unsigned both = eight_signs(z + i) << bit;
            *byte++ |= static_cast<uint8_t>(both);
            *byte |= static_cast<uint8_t>(both >> 8);
        }
    }
    for (; i < n; ++i) bits[(at + i) / 8] |= static_cast<uint8_t>((z[i] > 0) << (at + i) % 8);
}

template <class R> struct Bits { typedef uint32_t type __attribute__((may_alias)); };
template <> struct Bits<double> { typedef uint64_t type __attribute__((may_alias)); };

// What the gradients of eight values at a time are multiplied by: 1 where the sign is set, else the slope. If that is 0,
// what they are masked by, all bits or none: they may be infinite.
template <class R> void fill_slopes(R slope, R *slopes) {  // (256, 8)
    for (int byte = 0; byte < 256; ++byte)
        for (int bit = 0; bit < 8; ++bit) {
            R *to = slopes + byte * 8 + bit;
            *to = byte >> bit & 1 ? 1 : slope;
            if (slope == 0) memset(to, byte >> bit & 1 ? 0xff : 0, sizeof(R));
        }
}

template <class R, bool MASKS>
void through_signs(const uint8_t *bits, const R *slopes, const R *dy, R *dz, int64_t at, int64_t n) {
    using B = typename Bits<R>::type;
    const uint8_t *byte = bits + at / 8;
    unsigned bit = static_cast<unsigned>(at % 8);
    auto take = [&](int64_t i, const R *slope) __attribute__((always_inline)) {
        if constexpr (MASKS)
            *reinterpret_cast<B *>(dz + i) = *reinterpret_cast<const B *>(dy + i) & *reinterpret_cast<const B *>(slope);
        else
            dz[i] = dy[i] * *slope;
    };
    int64_t i = 0;
    for (; i + 8 <= n; i += 8, ++byte) {
        const R *eight = slopes + (bit == 0 ? *byte : ((*byte | byte[1] << 8) >> bit & 0xff)) * 8;
        SIMD for (int j = 0; j < 8; ++j) take(i + j, eight + j);
    }
    for (; i < n; ++i) take(i, slopes + (bits[(at + i) / 8] >> (at + i) % 8 & 1 ? 255 * 8 : 0));
}

// --------------------------------------------------------------------------------------------------------- activations

inline double exponential(double x) { return exp(x); }

inline float exponential(float x) {  // 2^k * e^r with |r| <= ln(2) / 2: within 1e-7, relative
    bool large = x > 88.0f;
    x = x < -87.0f ? -87.0f : large ? 0 : x;
    union { float value; uint32_t bits; } power = {x * 1.44269504f + 12582912.0f};  // 1.5 * 2^23: rounds to k
    float k = power.value - 12582912.0f;
    float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    power.bits = (power.bits + 127) << 23;  // 2^k: the last bits were those of k
    return large ? HUGE_VALF : p * power.value;
}

template <class R> inline R sigmoid(R z) { return 1 / (1 + exponential(-z)); }

constexpr double GELU = 1.5957691216057308, CUBE = 0.044715;  // 2 sqrt(2 / π); 0.5 z (1 + tanh u) = z sigmoid(2 u)

template <class R, int64_t ACTIVATION> inline R activate(R z) {
    if constexpr (ACTIVATION == RELU) return z > 0 ? z : z != z ? z : 0;
    if constexpr (ACTIVATION == LEAKY_RELU) return z > 0 ? z : z * R(NEGATIVE_SLOPE);
    if constexpr (ACTIVATION == SILU) return z * sigmoid(z);
    if constexpr (ACTIVATION == GELU_TANH) return z * sigmoid(R(GELU) * (z + R(CUBE) * z * z * z));
    return z;
}

template <class R> inline R derivative(int64_t activation, R z) {
    R end = activation == SILU ? 87 : 10;  // beyond, it is 0 or 1
    R c = z < -end ? -end : z > end ? end : z;
    R u = activation == SILU ? c : R(GELU) * (c + R(CUBE) * c * c * c);
    R du = activation == SILU ? 1 : R(GELU) * (1 + 3 * R(CUBE) * c * c);
    R q = exponential(-u), s = 1 / (1 + q);  // q s is 1 - s, to all its digits
    return z < -end ? 0 : s + c * s * (q * s) * du;
}

// -------------------------------------------------------------------------------------------------------- two reductions

// Sums over a segment, of e and of e * d, where d = x - shift. What e is:
enum Kind { DEVIATION, WEIGHTED_DEVIATION, GRADIENT, GRADIENT_THROUGH_RELU, MASKED_GRADIENT };

template <class M> struct Operands {
    using R = typename Arithmetic<M>::type;
    const M *x, *dy;                   // SEGMENT
    const R *mask;                     // SEGMENT
    const R *high, *scale, *shift;     // by entry
};

template <int KIND, class X> inline void term(X x, X dy, X mask, X high, X scale, X shift, X &e, X &d) {
    d = x - high;
    if constexpr (KIND == DEVIATION) e = d;
    if constexpr (KIND == WEIGHTED_DEVIATION) {
        d = mask == X{} ? X{} : d;
        e = mask * d;
    }
    if constexpr (KIND == GRADIENT) e = dy;
    if constexpr (KIND == GRADIENT_THROUGH_RELU) e = d * scale + shift > X{} ? dy : X{};
    if constexpr (KIND == MASKED_GRADIENT) {
        e = dy;
        d = mask == X{} ? (e == X{} ? X{} : d) : d;
    }
}

// The sums wait for memory, not the memory for them: with what they read next on its way they take up to a fifth less.
inline void prefetch(const void *from) { __builtin_prefetch(from); }

// Each entry has sums of its own, which are loaded and stored once for all the rows, `period` apart.
template <class M, int KIND, int ROWS, class R = typename Arithmetic<M>::type>
void accumulate_by_period(const Operands<M> &of, int64_t n, int64_t period, R *sum, R *product) {
    constexpr bool has_dy = KIND >= GRADIENT, has_mask = KIND == WEIGHTED_DEVIATION || KIND == MASKED_GRADIENT;
    constexpr bool has_map = KIND == GRADIENT_THROUGH_RELU;
    constexpr bool ahead = ROWS > 1 && (!has_dy || sizeof(M) < sizeof(R));  // else it gains nothing
    constexpr int64_t line = LINE / sizeof(M);
    const int64_t block = ahead ? 4 * line : n;
    for (int64_t from = 0; from < n; from += block) {
        if constexpr (ahead) {
            for (int row = ROWS; row < 2 * ROWS; ++row)
                for (int64_t j = from; j < from + block; j += line) {
                    prefetch(of.x + row * period + j);
                    if (has_dy) prefetch(of.dy + row * period + j);
                }
        }
        const int64_t end = smaller(from + block, n);
        SIMD for (int64_t i = from; i < end; ++i) {
            R high = of.high[i], scale = has_map ? of.scale[i] : 0, shift = has_map ? of.shift[i] : 0;
            R s = sum[i], p = product[i], e, d;
            for (int row = 0; row < ROWS; ++row) {
                int64_t j = row * period + i;
                term<KIND, R>(read(of.x[j]), has_dy ? read(of.dy[j]) : 0, has_mask ? of.mask[j] : 0, high, scale, shift,
                              e, d);
                s += e;
                p += e * d;
            }
            sum[i] = s;
            product[i] = p;
        }
    }
}

#if defined(__AVX512F__)
#define VECTOR 64
#elif defined(__AVX__)
#define VECTOR 32
#else
#define VECTOR 16
#endif

template <class R> struct Vector {  // what a register holds, wherever it lies in memory
    typedef R type __attribute__((vector_size(VECTOR), aligned(alignof(R)), may_alias));
    typedef typename Bits<R>::type bits __attribute__((vector_size(VECTOR), aligned(alignof(R)), may_alias));
    static constexpr int64_t size = VECTOR / sizeof(R);
};

// A register of values, from memory.
template <class R> inline typename Vector<R>::type read_vector(const R *from) {
    return *reinterpret_cast<const typename Vector<R>::type *>(from);
}

inline Vector<float>::type read_vector(const bf16 *from) {
#if defined(__AVX512F__)
    __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
#elif defined(__AVX2__)
    __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
#elif defined(__x86_64__)
    __m128i halves = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(from));
    return _mm_castsi128_ps(_mm_unpacklo_epi16(_mm_setzero_si128(), halves));
#else
    Vector<float>::type values;
    for (int64_t j = 0; j < Vector<float>::size; ++j) values[j] = single(from[j]);
    return values;
#endif
}

// How many values lie before `from` is aligned to as many as a register holds: at least 1, at most a register of them.
template <class M> inline int64_t unaligned(const M *from) {
    constexpr int64_t size = Vector<typename Arithmetic<M>::type>::size;
    return size - static_cast<int64_t>(reinterpret_cast<uintptr_t>(from) / sizeof(M) % size);
}

// Bits for each value of a vector: all from the place-th value on, none before.
template <class R> inline typename Vector<R>::bits from_place(int64_t place) {
    constexpr int64_t size = Vector<R>::size;
    static const struct Filled {
        typename Bits<R>::type bits[2 * size];
    } filled = [] {
        Filled f{};
        for (int64_t j = 0; j < size; ++j) f.bits[size + j] = ~typename Bits<R>::type{};
        return f;
    }();
    return *reinterpret_cast<const typename Vector<R>::bits *>(filled.bits + size - place);
}

// The sum of n values, half a vector added to the other each time.
template <class R, int64_t n> inline R across(const void *values) {
    if constexpr (n == 1) {
        return *static_cast<const R *>(values);
    } else {
        typedef R Half __attribute__((vector_size(n / 2 * sizeof(R))));
        Half halves[2];
        memcpy(halves, values, sizeof(halves));
        Half sum = halves[0] + halves[1];
        return across<R, n / 2>(&sum);
    }
}

// All values have one entry: two vectors of sums at a time, so that an addition need not wait for the last one. The
// first vector and the last one share values with their neighbours: those in between are aligned.
template <class M, int KIND, class R = typename Arithmetic<M>::type>
void accumulate_by_plane(const Operands<M> &of, int64_t n, R *sum, R *product) {
    using V = typename Vector<R>::type;
    using B = typename Vector<R>::bits;
    constexpr int64_t size = Vector<R>::size;
    constexpr bool has_dy = KIND >= GRADIENT, has_mask = KIND == WEIGHTED_DEVIATION || KIND == MASKED_GRADIENT;
    constexpr bool has_map = KIND == GRADIENT_THROUGH_RELU;
    const R high = of.high[0], scale = has_map ? of.scale[0] : 0, shift = has_map ? of.shift[0] : 0;
    if (n < size) {
        R total = 0, total_product = 0, e, d;
        for (int64_t i = 0; i < n; ++i) {
            term<KIND, R>(read(of.x[i]), has_dy ? read(of.dy[i]) : 0, has_mask ? of.mask[i] : 0, high, scale, shift, e, d);
            total += e, total_product += e * d;
        }
        *sum = total, *product = total_product;
        return;
    }
    V sums[2] = {}, products[2] = {}, e, d;
    auto take = [&](int64_t j) __attribute__((always_inline)) {
        V x = read_vector(of.x + j), dy = {}, mask = {};
        if constexpr (has_dy) dy = read_vector(of.dy + j);
        if constexpr (has_mask) mask = read_vector(of.mask + j);
        term<KIND, V>(x, dy, mask, V{} + high, V{} + scale, V{} + shift, e, d);
    };
    auto keep = [&](B bits) __attribute__((always_inline)) {
        e = reinterpret_cast<V>(reinterpret_cast<B>(e) & bits), d = reinterpret_cast<V>(reinterpret_cast<B>(d) & bits);
    };
    constexpr int64_t line = LINE / sizeof(M), ahead = AHEAD / sizeof(M);
    int64_t i = unaligned(of.x);
    take(0);
    keep(~from_place<R>(i));
    sums[0] = e, products[0] = e * d;
    for (; i + 2 * size <= n; i += 2 * size) {
        for (int64_t j = 0; j < 2 * size; j += line) {
            prefetch(of.x + i + j + ahead);
            if (has_dy) prefetch(of.dy + i + j + ahead);
        }
        take(i);
        sums[0] += e, products[0] += e * d;
        take(i + size);
        sums[1] += e, products[1] += e * d;
    }
    if (i + size <= n) {
        take(i);
        sums[0] += e, products[0] += e * d;
        i += size;
    }
    if (i < n) {
        take(n - size);
        keep(from_place<R>(size - (n - i)));
        sums[1] += e, products[1] += e * d;
    }
    sums[0] += sums[1], products[0] += products[1];
    *sum = across<R, size>(&sums[0]), *product = across<R, size>(&products[0]);
}

// Sum over all the memory: `segment(thread, at, entry, n)` gives the operands. (C,) each. If segment.in_place, these are
// the tensors themselves, so that of one period they lead to the next.
template <class M> struct Sums {
    using R = typename Arithmetic<M>::type;
    const Walk &walk;
    Scratch scratch;
    double *sum, *product;                // (C,)
    double *sums, *products;              // (threads, entries)
    R *row_sums, *row_products;           // (threads, entries)

    explicit Sums(const Walk &w)
        : walk(w), scratch(2 * Scratch::bytes<double>(w.channels) +
                           2 * w.threads * (Scratch::bytes<double>(w.entries()) + Scratch::bytes<R>(w.entries()))) {
        if (!scratch) return;
        sum = scratch.array<double>(walk.channels), product = scratch.array<double>(walk.channels);
        sums = scratch.array<double>(walk.threads * walk.entries());
        products = scratch.array<double>(walk.threads * walk.entries());
        row_sums = scratch.array<R>(walk.threads * walk.entries());
        row_products = scratch.array<R>(walk.threads * walk.entries());
    }

    template <int KIND, class Segment> void add_up(Segment segment) {
        int64_t entries = walk.entries();
        in_parallel(walk.threads, [&](int64_t thread) {
            memset(sums + thread * entries, 0, entries * sizeof(double));
            memset(products + thread * entries, 0, entries * sizeof(double));
            walk.by_period ? add_periods<KIND>(thread, segment) : add_planes<KIND>(thread, segment);
        });
        memset(sum, 0, walk.channels * sizeof(double)), memset(product, 0, walk.channels * sizeof(double));
        for (int64_t thread = 0; thread < walk.threads; ++thread) {  // in this order: the same sums each time
            const double *s = sums + thread * entries, *p = products + thread * entries;
            if (!walk.by_period || (walk.repeats && entries == walk.channels)) {
                SIMD for (int64_t c = 0; c < walk.channels; ++c) sum[c] += s[c], product[c] += p[c];
            } else {
                for (int64_t e = 0; e < entries; ++e) sum[walk.channel(e)] += s[e], product[walk.channel(e)] += p[e];
            }
        }
    }

  private:
    template <int KIND, class Segment> void add_planes(int64_t thread, const Segment &segment) {
        double *s = sums + thread * walk.entries(), *p = products + thread * walk.entries();
        walk.planes(thread, [&](int64_t at, int64_t entry, int64_t n) {
            R one, other;
            accumulate_by_plane<M, KIND>(segment(thread, at, entry, n), n, &one, &other);
            s[entry] += one, p[entry] += other;
        });
    }
    template <int KIND, class Segment> void add_periods(int64_t thread, const Segment &segment) {
        int64_t entries = walk.entries(), added = 0;
        double *s = sums + thread * entries, *p = products + thread * entries;
        R *rs = row_sums + thread * entries, *rp = row_products + thread * entries;
        memset(rs, 0, entries * sizeof(R)), memset(rp, 0, entries * sizeof(R));
        auto flush = [&] {
            SIMD for (int64_t e = 0; e < entries; ++e) {
                s[e] += rs[e], p[e] += rp[e];
                rs[e] = rp[e] = 0;
            }
            added = 0;
        };
        walk.periods(thread, segment.in_place ? ROWS_AT_A_TIME : 1, [&](int64_t at, int64_t entry, int64_t n, int64_t rows) {
            if (entry == 0 && (added += rows) > ROWS_IN_SINGLE) flush(), added = rows;
            Operands<M> of = segment(thread, at, entry, n);
            rows > 1 ? accumulate_by_period<M, KIND, ROWS_AT_A_TIME>(of, n, walk.period, rs + entry, rp + entry)
                     : accumulate_by_period<M, KIND, 1>(of, n, walk.period, rs + entry, rp + entry);
        });
        flush();
    }
};

// ------------------------------------------------------------------------------------------------------------- kernels

// The value that memory of type T holds. A shift like that leaves differences of few digits, whose sums round less: the
// digits of any other, the same in each difference, are rounded off in the same direction each time.
template <class T> double in_memory(double value) {
    using R = typename Arithmetic<T>::type;
    if constexpr (sizeof(T) == sizeof(R)) {
        return static_cast<T>(value);
    } else {
        float single_value = static_cast<float>(value), buffer;
        T stored;
        convert(&single_value, &stored, 1);
        return *load(&stored, &buffer, 1);
    }
}

// A first estimate of each channel's mean, from its first few values.
template <class T, class R> void estimate(const Walk &walk, const T *x, const R *mask, double *mean, double *seen) {
    memset(mean, 0, walk.channels * sizeof(double)), memset(seen, 0, walk.channels * sizeof(double));
    R buffer[FIRST_VALUES * SMALLEST_PLANE], weight;
    auto take = [&](int64_t at, int64_t channel, int64_t n) {
        const R *values = load(x + at, buffer, n);
        for (int64_t i = 0; i < n; ++i) {
            bool counts = !mask || *weights(mask, walk, at + i, 1, &weight) != 0;
            mean[channel] += counts ? values[i] : 0;
            seen[channel] += counts;
        }
    };
    if (walk.by_period && walk.repeats) {
        int64_t rows = smaller(walk.values / walk.channels, FIRST_VALUES);
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t c = 0; c < walk.channels; ++c) take(row * walk.channels + c, c, 1);
    } else {
        int64_t samples = walk.by_period ? smaller(walk.values / (walk.plane * walk.channels), FIRST_VALUES) : 1;
        for (int64_t plane = 0; plane < samples * walk.channels; ++plane)
            take(plane * walk.plane, plane % walk.channels, smaller(walk.plane, FIRST_VALUES));
    }
    for (int64_t c = 0; c < walk.channels; ++c)
        if (seen[c] > 0) mean[c] = in_memory<T>(mean[c] / seen[c]);
}

template <class T> struct Deviations {  // the operands of a segment
    using R = typename Arithmetic<T>::type;
    using M = typename InRegisters<T>::type;
    const T *x;
    const R *mask, *high;
    const Walk &walk;
    M *values;  // (threads, SEGMENT)
    R *weight;  // (threads, SEGMENT)
    bool in_place;

    Operands<M> operator()(int64_t thread, int64_t at, int64_t entry, int64_t n) const {
        Operands<M> of{};
        of.x = load(x + at, values + thread * SEGMENT, n);
        if (mask) of.mask = weights(mask, walk, at, n, weight + thread * SEGMENT);
        of.high = high + entry;
        return of;
    }
};

template <class T> int moments(const MomentsArguments &a) {
    using R = typename Arithmetic<T>::type;
    using M = typename InRegisters<T>::type;
    const T *x = static_cast<const T *>(a.x);
    const R *mask = static_cast<const R *>(a.mask);
    int64_t channels = a.shape.c, positions = a.shape.n * a.shape.s;
    double *mean = a.moments, *m2 = a.moments + channels, count = static_cast<double>(positions);
    if (mask) {
        count = 0;
        for (int64_t i = 0; i < positions; ++i) count += mask[i];
    }
    a.moments[2 * channels] = count;
    if (!(count > 0) || channels == 0) {
        memset(a.moments, 0, 2 * channels * sizeof(double));
        return 0;
    }
    Walk walk(a.shape, false);
    Sums<M> sums(walk);
    Scratch scratch(Scratch::bytes<R>(walk.entries()) + 2 * walk.threads * Scratch::bytes<R>(SEGMENT));
    if (!sums.scratch || !scratch) return 1;
    R *high = scratch.array<R>(walk.entries());
    M *values = scratch.array<M>(walk.threads * SEGMENT);
    R *weight = scratch.array<R>(walk.threads * SEGMENT);
    Deviations<T> segment{x, mask, high, walk, values, weight, sizeof(T) == sizeof(M) && !mask};
    estimate<T, R>(walk, x, mask, mean, m2);
    for (int attempt = 0; attempt < 2; ++attempt) {
        expand(walk, mean, high);
        mask ? sums.template add_up<WEIGHTED_DEVIATION>(segment) : sums.template add_up<DEVIATION>(segment);
        bool good = true;
        for (int64_t c = 0; c < channels; ++c) {
            double off = sums.sum[c] / count, rest = sums.product[c] - sums.sum[c] * off;
            m2[c] = rest > 0 ? rest : rest != rest ? rest : 0;
            good = good && !(sums.sum[c] * off > CANCELLATION * m2[c]);
            mean[c] += off;
        }
        if (good) break;  // else once more about the mean, for the channels whose first values were unlike the rest
        if (attempt == 0)
            for (int64_t c = 0; c < channels; ++c) mean[c] = in_memory<T>(mean[c]);
    }
    return 0;
}

// The arrays by entry that the passes over the data read.
template <class R> struct Affine {
    R *high, *scale, *shift, *slope, *offset, *inverse;
    const double *mean;  // (C,)

    static int64_t bytes(const Walk &walk) {
        return 6 * Scratch::bytes<R>(walk.entries()) + 7 * Scratch::bytes<double>(walk.channels);
    }
    Affine(Scratch &scratch, const Walk &walk)
        : high(scratch.array<R>(walk.entries())), scale(scratch.array<R>(walk.entries())),
          shift(scratch.array<R>(walk.entries())), slope(scratch.array<R>(walk.entries())),
          offset(scratch.array<R>(walk.entries())), inverse(scratch.array<R>(walk.entries())) {}

    // The passes of the backward. In place x - mean is computed from y, and takes the place of x: then the mean is 0.
    template <class T> void fill(Scratch &scratch, const Walk &walk, const BackwardArguments &of) {
        mean = of.statistics;
        if (of.epilogue.inplace) {
            invert<T>(scratch, walk, of);
            double *zeros = scratch.array<double>(walk.channels);
            memset(zeros, 0, walk.channels * sizeof(double));
            mean = zeros;
        }
        fill(scratch, walk, mean, of.statistics + walk.channels, of.parameters);
    }
    // high: the mean; its rest, which R cannot hold beside it, goes into the shift: z = (x - high) * scale + shift
    void fill(Scratch &scratch, const Walk &walk, const double *mean, const double *invstd, const Parameters &of) {
        int64_t channels = walk.channels;
        double *w = scratch.array<double>(channels), *b = scratch.array<double>(channels);
        parameter(of.weight, of.dtype, channels, 1, w);
        parameter(of.bias, of.dtype, channels, 0, b);
        SIMD for (int64_t c = 0; c < channels; ++c) {
            w[c] *= invstd[c];
            b[c] -= (mean[c] - static_cast<R>(mean[c])) * w[c];
        }
        expand(walk, mean, high);
        expand(walk, w, scale);
        expand(walk, b, shift);
    }

  private:
    // inverse: what z - bias is multiplied by to give x - mean, damped where the weight is below what rounding z to T
    // has added to it; reference.py says how.
    template <class T> void invert(Scratch &scratch, const Walk &walk, const BackwardArguments &of) {
        int64_t channels = walk.channels;
        const double *invstd = of.statistics + channels;
        double least = Precision<T>::tiny / (of.epilogue.activation == LEAKY_RELU ? NEGATIVE_SLOPE : 1);
        double *w = scratch.array<double>(channels), *b = scratch.array<double>(channels);
        parameter(of.parameters.weight, of.parameters.dtype, channels, 1, w);
        parameter(of.parameters.bias, of.parameters.dtype, channels, 0, b);
        for (int64_t c = 0; c < channels; ++c) {
            double scale = w[c] * invstd[c], noise = Precision<T>::eps / sqrt(12.0) * (fabs(b[c]) + least) * invstd[c];
            if (noise < LEAST_NOISE) noise = LEAST_NOISE;
            w[c] = scale / (scale * scale + noise * noise);
        }
        expand(walk, w, inverse);
    }
};

template <class M, int64_t ACTIVATION, bool BY_PERIOD, bool RESIDUAL, class R = typename Arithmetic<M>::type>
void affine(const M *x, const M *residual, M *y, int64_t n, const Affine<R> &of, int64_t entry) {
    const R *high = of.high + entry, *scale = of.scale + entry, *shift = of.shift + entry;
    SIMD for (int64_t i = 0; i < n; ++i) {
        int64_t e = BY_PERIOD ? i : 0;
        R z = (read(x[i]) - high[e]) * scale[e] + shift[e];
        if constexpr (RESIDUAL) z += read(residual[i]);
        write(activate<R, ACTIVATION>(z), y + i);
    }
}

template <class M>
using AffineSegment =
    void (*)(const M *, const M *, M *, int64_t, const Affine<typename Arithmetic<M>::type> &, int64_t);

template <class M, int64_t ACTIVATION> AffineSegment<M> affine_with(bool by_period, bool residual) {
    if (by_period) return residual ? affine<M, ACTIVATION, true, true> : affine<M, ACTIVATION, true, false>;
    return residual ? affine<M, ACTIVATION, false, true> : affine<M, ACTIVATION, false, false>;
}

template <class M> AffineSegment<M> affine_segment(int64_t activation, bool by_period, bool residual) {
    switch (activation) {
        case RELU: return affine_with<M, RELU>(by_period, residual);
        case LEAKY_RELU: return affine_with<M, LEAKY_RELU>(by_period, residual);
        case SILU: return affine_with<M, SILU>(by_period, residual);
        case GELU_TANH: return affine_with<M, GELU_TANH>(by_period, residual);
        default: return affine_with<M, NONE>(by_period, residual);
    }
}

template <class T, class M> int normalize(const NormalizeArguments &a) {
    using R = typename Arithmetic<T>::type;
    int64_t channels = a.shape.c;
    double count = a.moments[2 * channels] > 0 ? a.moments[2 * channels] : 1;
    SIMD for (int64_t c = 0; c < channels; ++c) {
        double variance = a.moments[channels + c] / count;
        a.statistics[c] = a.moments[c];
        a.statistics[channels + c] = a.eps_outside ? 1 / (sqrt(variance) + a.eps) : 1 / sqrt(variance + a.eps);
    }
    a.statistics[2 * channels] = a.moments[2 * channels];
    if (a.shape.values() == 0) return 0;

    const T *x = static_cast<const T *>(a.x), *residual = static_cast<const T *>(a.epilogue.residual);
    uint8_t *signs = a.epilogue.signs;
    Walk walk(a.shape, signs);
    Scratch scratch(Affine<R>::bytes(walk) + 4 * walk.threads * Scratch::bytes<M>(SEGMENT));
    if (!scratch) return 1;
    Affine<R> map(scratch, walk);
    map.fill(scratch, walk, a.statistics, a.statistics + channels, a.parameters);
    M *buffers = scratch.array<M>(4 * walk.threads * SEGMENT);
    if (signs) memset(signs, 0, (a.shape.values() + 7) / 8);
    AffineSegment<M> affine = affine_segment<M>(a.epilogue.activation, walk.by_period, residual);
    bool streams = a.y != a.x && streams_to(a.y, walk.values * static_cast<int64_t>(sizeof(T)));
    in_parallel(walk.threads, [&](int64_t thread) {
        Fence fence;
        M *buffer = buffers + 4 * thread * SEGMENT;
        Result<T, M> y(a.y, streams, buffer);
        walk.backward(thread, [&](int64_t at, int64_t entry, int64_t n) {
            const M *added = residual ? load(residual + at, buffer + 2 * SEGMENT, n) : nullptr;
            M *segment = y.place(at, n);
            affine(load(x + at, buffer + 3 * SEGMENT, n), added, segment, n, map, entry);
            if constexpr (sizeof(M) == sizeof(R))
                if (signs) write_signs(segment, signs, at, n);  // y has the sign of z
            y.put(at, n);
        });
    });
    return 0;
}

template <class T> int normalize(const NormalizeArguments &a) {
    if (a.epilogue.signs) return normalize<T, typename Arithmetic<T>::type>(a);  // of z before it is rounded
    return normalize<T, typename InRegisters<T>::type>(a);
}

// Whether a pass takes dz from x and dy itself, so that it need not be there.
inline bool through_relu(const BackwardArguments &of, bool wants_dz) {
    return of.epilogue.activation == RELU && !of.epilogue.signs && !of.mask && !wants_dz;
}

// Whether x and dy, beside a mask, are all that it takes.
inline bool takes_x_and_dy(const BackwardArguments &of, bool wants_dz) {
    return through_relu(of, wants_dz) || (of.epilogue.activation == NONE && !of.epilogue.inplace);
}

// Of a segment: dz, the gradient of z, from dy, and x - mean where x is to be had from y.
template <class T, class M> struct Backward {
    using R = typename Arithmetic<T>::type;
    const T *dy, *x, *residual;
    const R *mask;
    const Epilogue &epilogue;
    const Walk &walk;
    Affine<R> &map;
    R *buffers;  // (threads, 5, SEGMENT)
    bool direct;    // x and dy are all that the pass takes
    bool in_place;  // as they lie in memory
    const R *slopes;  // (256, 8) where there are signs

    static int64_t bytes(const Walk &walk) { return Scratch::bytes<R>(5 * walk.threads * SEGMENT) + Scratch::bytes<R>(2048); }
    Backward(const BackwardArguments &of, const Walk &w, Affine<R> &affine, Scratch &scratch, bool wants_dz)
        : dy(static_cast<const T *>(of.dy)), x(static_cast<const T *>(of.x)),
          residual(static_cast<const T *>(of.epilogue.residual)), mask(static_cast<const R *>(of.mask)),
          epilogue(of.epilogue), walk(w), map(affine), buffers(scratch.array<R>(5 * w.threads * SEGMENT)),
          direct(takes_x_and_dy(of, wants_dz)), in_place(direct && !mask && sizeof(T) == sizeof(M)) {
        R *filled = scratch.array<R>(2048);
        if (epilogue.signs) fill_slopes<R>(epilogue.activation == LEAKY_RELU ? R(NEGATIVE_SLOPE) : 0, filled);
        slopes = filled;
    }

    Operands<M> operator()(int64_t thread, int64_t at, int64_t entry, int64_t n) const {
        R *buffer = buffers + 5 * thread * SEGMENT;
        M *values = reinterpret_cast<M *>(buffer);
        Operands<M> of{load(x + at, values, n), load(dy + at, values + SEGMENT, n), nullptr,
                       map.high + entry, map.scale + entry, map.shift + entry};
        if (mask) of.mask = weights(mask, walk, at, n, buffer + 2 * SEGMENT);
        if constexpr (sizeof(M) == sizeof(R))
            if (!direct) through_epilogue(of, map.inverse + entry, buffer + 3 * SEGMENT, buffer + 4 * SEGMENT, at, n);
        return of;
    }

  private:
    void through_epilogue(Operands<R> &of, const R *inverse, R *dz, R *centered, int64_t at, int64_t n) const {
        int64_t by = walk.by_period;  // 1: an entry a value
        R slope = epilogue.activation == LEAKY_RELU ? R(NEGATIVE_SLOPE) : epilogue.activation == RELU ? 0 : 1;
        const R *dy = of.dy, *x = of.x;
        if (epilogue.inplace) {
            SIMD for (int64_t i = 0; i < n; ++i) {
                R z = x[i] > 0 ? x[i] : x[i] / slope;
                dz[i] = x[i] > 0 ? dy[i] : dy[i] * slope;
                centered[i] = (z - of.shift[i * by]) * inverse[i * by];
            }
            of.x = centered;
        } else if (epilogue.signs) {
            slope == 0 ? through_signs<R, true>(epilogue.signs, slopes, dy, dz, at, n)
                       : through_signs<R, false>(epilogue.signs, slopes, dy, dz, at, n);
        } else if (epilogue.activation == RELU || epilogue.activation == LEAKY_RELU) {
            SIMD for (int64_t i = 0; i < n; ++i) {
                R z = (x[i] - of.high[i * by]) * of.scale[i * by] + of.shift[i * by];
                dz[i] = z > 0 ? dy[i] : dy[i] * slope;
            }
        } else {
            const R *added = residual ? load(residual + at, dz, n) : nullptr;
            SIMD for (int64_t i = 0; i < n; ++i) {
                R z = (x[i] - of.high[i * by]) * of.scale[i * by] + of.shift[i * by];
                centered[i] = added ? z + added[i] : z;
            }
            if (epilogue.activation == SILU) {
                SIMD for (int64_t i = 0; i < n; ++i) dz[i] = dy[i] * derivative<R>(SILU, centered[i]);
            } else {
                SIMD for (int64_t i = 0; i < n; ++i) dz[i] = dy[i] * derivative<R>(GELU_TANH, centered[i]);
            }
        }
        if (of.mask) {  // where nothing counts and no gradient comes, x may be no number
            SIMD for (int64_t i = 0; i < n; ++i) dz[i] = of.mask[i] == 0 && dy[i] == 0 ? 0 : dz[i];
        }
        of.dy = dz;
    }
};

template <class T, class M> int reduce_grad(const ReduceGradArguments &a) {
    using R = typename Arithmetic<T>::type;
    const BackwardArguments &of = a.of;
    int64_t channels = of.shape.c;
    if (of.shape.values() == 0) {
        memset(a.sums, 0, 2 * channels * sizeof(double));
        to_parameter(a.sums, a.dtype, channels, a.grad_weight);
        to_parameter(a.sums, a.dtype, channels, a.grad_bias);
        return 0;
    }
    Walk walk(of.shape, false);
    Sums<M> sums(walk);
    Scratch scratch(Affine<R>::bytes(walk) + Backward<T, M>::bytes(walk));
    if (!sums.scratch || !scratch) return 1;
    Affine<R> map(scratch, walk);
    map.template fill<T>(scratch, walk, of);
    Backward<T, M> segment(of, walk, map, scratch, false);
    if (of.mask) sums.template add_up<MASKED_GRADIENT>(segment);
    else if (through_relu(of, false)) sums.template add_up<GRADIENT_THROUGH_RELU>(segment);
    else sums.template add_up<GRADIENT>(segment);
    double *weight = sums.sums;  // no longer needed; (entries,) holds (C,)
    parameter(of.parameters.weight, of.parameters.dtype, channels, 1, weight);
    const double *mean = map.mean, *invstd = of.statistics + channels;
    double *sum = sums.sum, *product = sums.product;
    SIMD for (int64_t c = 0; c < channels; ++c) {
        double low = mean[c] - static_cast<R>(mean[c]);
        product[c] = (product[c] - low * sum[c]) * invstd[c];
        a.sums[c] = sum[c] * weight[c];
        a.sums[channels + c] = product[c] * weight[c];
    }
    to_parameter(product, a.dtype, channels, a.grad_weight);
    to_parameter(sum, a.dtype, channels, a.grad_bias);
    return 0;
}

template <class T> int reduce_grad(const ReduceGradArguments &a) {
    if (takes_x_and_dy(a.of, false)) return reduce_grad<T, typename InRegisters<T>::type>(a);
    return reduce_grad<T, typename Arithmetic<T>::type>(a);
}

// dx = scale * dz + slope * (x - high) + offset
template <class M, bool BY_PERIOD, bool THROUGH_RELU, bool MASKED, class R = typename Arithmetic<M>::type>
void grad_segment(const Operands<M> &of, const Affine<R> &map, int64_t entry, M *dx, int64_t n) {
    const R *slope = map.slope + entry, *offset = map.offset + entry;
    SIMD for (int64_t i = 0; i < n; ++i) {
        int64_t e = BY_PERIOD ? i : 0;
        R d = read(of.x[i]) - of.high[e], dz = read(of.dy[i]);
        if constexpr (THROUGH_RELU) dz = d * of.scale[e] + of.shift[e] > 0 ? dz : 0;
        R through = slope[e] * d + offset[e];
        if constexpr (MASKED) through = of.mask[i] == 0 ? 0 : of.mask[i] * through;
        write(of.scale[e] * dz + through, dx + i);
    }
}

template <class M>
using GradSegment = void (*)(const Operands<M> &, const Affine<typename Arithmetic<M>::type> &, int64_t, M *, int64_t);

template <class M, bool BY_PERIOD> GradSegment<M> grad_by(bool through_relu, bool masked) {
    if (masked) return grad_segment<M, BY_PERIOD, false, true>;
    return through_relu ? grad_segment<M, BY_PERIOD, true, false> : grad_segment<M, BY_PERIOD, false, false>;
}

template <class T, class M> int grad_input(const GradInputArguments &a) {
    using R = typename Arithmetic<T>::type;
    const BackwardArguments &of = a.of;
    if (of.shape.values() == 0) return 0;
    int64_t channels = of.shape.c;
    Walk walk(of.shape, false);
    Scratch scratch(Affine<R>::bytes(walk) + Backward<T, M>::bytes(walk) + Scratch::bytes<M>(4 * walk.threads * SEGMENT));
    if (!scratch) return 1;
    Affine<R> map(scratch, walk);
    map.template fill<T>(scratch, walk, of);
    double *slope = scratch.array<double>(channels), *offset = scratch.array<double>(channels);
    const double *mean = map.mean, *invstd = of.statistics + channels;
    double count = of.statistics[2 * channels] > 0 ? of.statistics[2 * channels] : 1;
    for (int64_t c = 0; c < channels; ++c) {
        double inside = 1 - a.eps_outside * invstd[c];  // 0 where all values are, at which x is too
        slope[c] = a.sums ? -invstd[c] * invstd[c] * a.sums[channels + c] / (count * (inside > 0 ? inside : 1)) : 0;
        offset[c] = a.sums && a.centered ? -invstd[c] * a.sums[c] / count : 0;
        offset[c] -= slope[c] * (mean[c] - static_cast<R>(mean[c]));
    }
    expand(walk, slope, map.slope);
    expand(walk, offset, map.offset);
    Backward<T, M> segment(of, walk, map, scratch, a.dz);
    M *buffers = scratch.array<M>(4 * walk.threads * SEGMENT);
    bool relu = through_relu(of, a.dz);
    GradSegment<M> grad = walk.by_period ? grad_by<M, true>(relu, of.mask) : grad_by<M, false>(relu, of.mask);
    bool streams = streams_to(a.dx, walk.values * static_cast<int64_t>(sizeof(T)));
    in_parallel(walk.threads, [&](int64_t thread) {
        Fence fence;
        M *buffer = buffers + 4 * thread * SEGMENT;
        Result<T, M> dx(a.dx, streams, buffer), dz(a.dz, streams, buffer + 2 * SEGMENT);
        walk.backward(thread, [&](int64_t at, int64_t entry, int64_t n) {
            Operands<M> operands = segment(thread, at, entry, n);
            grad(operands, map, entry, dx.place(at, n), n);
            dx.put(at, n);
            if (a.dz) {
                M *to = dz.place(at, n);
                SIMD for (int64_t i = 0; i < n; ++i) to[i] = operands.dy[i];
                dz.put(at, n);
            }
        });
    });
    return 0;
}

template <class T> int grad_input(const GradInputArguments &a) {
    if (takes_x_and_dy(a.of, a.dz)) return grad_input<T, typename InRegisters<T>::type>(a);
    return grad_input<T, typename Arithmetic<T>::type>(a);
}

template <class P> void update_running(const UpdateArguments &a) {
    double count = a.moments[2 * a.c];
    if (!(count > 0)) return;
    if (a.batches) ++*a.batches;
    double factor = a.cumulative ? 1 / static_cast<double>(*a.batches) : a.momentum;
    P *mean = static_cast<P *>(a.mean), *var = static_cast<P *>(a.var);
    double divisor = count > 1 ? count - 1 : 1;
    SIMD for (int64_t c = 0; c < a.c; ++c) {
        mean[c] = static_cast<P>(mean[c] + factor * (a.moments[c] - mean[c]));
        var[c] = static_cast<P>(var[c] + factor * (a.moments[a.c + c] / divisor - var[c]));
    }
}

}  // namespace

#define BY_DTYPE(function, arguments, of) \
    switch ((of).dtype) { \
        case FLOAT32: return function<float>(*(arguments)); \
        case FLOAT64: return function<double>(*(arguments)); \
        case BFLOAT16: return function<bf16>(*(arguments)); \
        default: return function<fp16>(*(arguments)); \
    }

EXPORT(moments)(const MomentsArguments *arguments) { BY_DTYPE(moments, arguments, arguments->shape) }
EXPORT(normalize)(const NormalizeArguments *arguments) { BY_DTYPE(normalize, arguments, arguments->shape) }
EXPORT(reduce_grad)(const ReduceGradArguments *arguments) { BY_DTYPE(reduce_grad, arguments, arguments->of.shape) }
EXPORT(grad_input)(const GradInputArguments *arguments) { BY_DTYPE(grad_input, arguments, arguments->of.shape) }

EXPORT(update_running)(const UpdateArguments *arguments) {  // float32 or float64
    arguments->dtype == FLOAT64 ? update_running<double>(*arguments) : update_running<float>(*arguments);
    return 0;
}

EXPORT(pack)(const PackArguments *arguments) {
    int64_t c = arguments->c;
    double *values = arguments->values, count = values[2 * c];
    SIMD for (int64_t i = 0; i < c; ++i) {
        double mean = values[i], total = count * mean;
        values[i] = total;
        values[c + i] += total * mean;
    }
    return 0;
}

EXPORT(unpack)(const PackArguments *arguments) {
    int64_t c = arguments->c;
    double *values = arguments->values, count = values[2 * c] > 0 ? values[2 * c] : 1;
    SIMD for (int64_t i = 0; i < c; ++i) {
        double mean = values[i] / count, m2 = values[c + i] - values[i] * mean;
        values[i] = mean;
        values[c + i] = m2 > 0 ? m2 : m2 != m2 ? m2 : 0;
    }
    return 0;
}

#ifdef SYNCNORM_DISPATCH
extern "C" __attribute__((visibility("default"))) uint32_t syncnorm_source() { return SYNCNORM_SOURCE; }

extern "C" __attribute__((visibility("default"))) const char *syncnorm_isa() {  // the best of this machine
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
        return "avx512";
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return "avx2";
#endif
    return "base";
}
#endif
