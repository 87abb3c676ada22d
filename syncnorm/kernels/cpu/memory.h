// The memory of one call: its scratch arrays, and the writing of results, past the caches if they are large.
#pragma once

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

#include "dtypes.h"

namespace {

constexpr int64_t SEGMENT = 1024;         // values
constexpr int64_t WRITTEN = 256;          // values: a segment of a pass that writes, which is to read meanwhile
constexpr int64_t LINE = 64;              // bytes
constexpr int64_t ON_STACK = 48 << 10;    // bytes of scratch memory
constexpr int64_t STREAMED = 4 << 20;     // bytes: a larger result is written past the caches

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

class Scratch {  // for one call, cut into arrays. For a small layer it is on the stack: malloc takes longer than the pass
  public:
    explicit Scratch(int64_t bytes)
        : start_(bytes <= ON_STACK ? own_ : static_cast<char *>(aligned_alloc(64, rounded(bytes) + 64))), next_(start_) {}
    ~Scratch() {
        if (start_ != own_) free(start_);
    }
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
    alignas(64) char own_[ON_STACK];
    char *const start_;
    char *next_;
};

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

}  // namespace
