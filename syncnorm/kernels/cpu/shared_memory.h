// The all-reduce of the ranks of one host, in memory that they share. communicators/shared_memory.py maps it and calls
// these functions.
//
// Each rank has two slots, which it uses in turn. In call k it copies its message to slot k % 2 and adds one to
// `arrived`. When all W ranks have done so, arrived is k * W, and each rank sums the slots in the order of the ranks. No
// second barrier is needed: a slot is written again in call k + 2, which begins on no rank before all have arrived in
// call k + 1, and so have read the slots of call k.
//
// If the ranks of the job are on several hosts, the first rank of each host, its leader, sums its slots to a result, adds
// the results of the other hosts, and publishes the sum, which the others copy.
//
// Counters wrap around. They are compared by their difference, which is far below 2^31.
#pragma once

#include <errno.h>
#include <linux/futex.h>
#include <sched.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "dtypes.h"

namespace {

constexpr int64_t MOST_BYTES = 65536;  // of a message's values
constexpr int64_t YIELDING = 1000000;  // ns for which a rank gives way to others before it sleeps
constexpr int64_t CROWDED = 50000;     // the same if there are more ranks than cores
constexpr int SPINS = 100;              // some 1 to 3 µs, within which ranks on cores of their own meet

enum Value : int64_t { INT8 = 4, INT16, INT32, INT64, UINT8 };  // beside Dtype
enum Outcome : int64_t { DONE, WAITING, DIFFERENT, FAILED };

struct Message {
    int64_t number, call, backward;  // of the label
    int64_t bytes, dtype;            // of the values; any number for a dtype that is not summed here
    char layer[160];
};

struct alignas(64) Slot {
    Message message;
    alignas(64) char values[MOST_BYTES];
};

struct alignas(64) Gate {
    uint32_t count, sleepers;
};

struct alignas(64) Rank {
    uint32_t calls, has_left;
};

struct Progress {  // of a rank, for reports
    int64_t calls, has_left;
    Message message;
};

struct alignas(64) Segment {
    char head[128];  // which Python writes and checks
    Gate arrived, published;
    int64_t outcome[2];  // of the published results
    alignas(64) Rank ranks[1];  // W of them, then 2 * W slots and two results

    Slot *slots(int64_t ranks_here) { return reinterpret_cast<Slot *>(ranks + ranks_here); }
    static int64_t bytes(int64_t ranks_here) {
        return sizeof(Segment) + (ranks_here - 1) * sizeof(Rank) + 2 * (ranks_here + 1) * sizeof(Slot);
    }
};

struct SharedArguments {
    Segment *segment;
    int64_t rank, ranks;  // of this host
    int64_t crowded;      // whether there are more ranks than cores
    int64_t patience;     // ns
    void *values;         // what is sent, and in which the sum is returned
    Message message;

    Slot &slot(uint32_t call, int64_t of) const { return segment->slots(ranks)[2 * of + call % 2]; }
    Slot &result(uint32_t call) const { return slot(call, ranks); }
    uint32_t calls() const { return segment->ranks[rank].calls; }
};

inline int64_t nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

inline bool is_open(const Gate &gate, uint32_t target) {
    return static_cast<int32_t>(__atomic_load_n(&gate.count, __ATOMIC_ACQUIRE) - target) >= 0;
}

// Wakes those who sleep at a gate. Either they are counted here, or they see the count before they sleep.
inline void wake(Gate &gate) {
    if (__atomic_load_n(&gate.sleepers, __ATOMIC_SEQ_CST))
        syscall(SYS_futex, &gate.count, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
}

// Returns whether the gate opens in time. Signals end the wait, so that Python can handle them.
inline bool wait(Gate &gate, uint32_t target, const SharedArguments &arguments) {
    if (is_open(gate, target)) return true;
    if (!arguments.crowded)
        for (int i = 0; i < SPINS; ++i) {
            pause();
            if (is_open(gate, target)) return true;
        }
    const int64_t start = nanoseconds(), limit = arguments.crowded ? CROWDED : YIELDING;
    int64_t waited;
    do {
        sched_yield();
        if (is_open(gate, target)) return true;
        waited = nanoseconds() - start;
    } while (waited < limit);
    __atomic_fetch_add(&gate.sleepers, 1, __ATOMIC_SEQ_CST);
    bool opened = false;
    for (; waited < arguments.patience; waited = nanoseconds() - start) {
        const uint32_t count = __atomic_load_n(&gate.count, __ATOMIC_SEQ_CST);
        if ((opened = static_cast<int32_t>(count - target) >= 0)) break;
        const int64_t left = arguments.patience - waited;
        const timespec limit_of_sleep = {static_cast<time_t>(left / 1000000000), static_cast<long>(left % 1000000000)};
        if (syscall(SYS_futex, &gate.count, FUTEX_WAIT, count, &limit_of_sleep, nullptr, 0) && errno == EINTR) break;
    }
    __atomic_fetch_sub(&gate.sleepers, 1, __ATOMIC_SEQ_CST);
    return opened || is_open(gate, target);
}

inline bool same(const Message &one, const Message &other) {
    return !memcmp(&one, &other, offsetof(Message, layer));
}

// The type in which values are summed: halves as float.
template <class T> struct Total { using type = T; };
template <> struct Total<bf16> { using type = float; };
template <> struct Total<fp16> { using type = float; };

template <class T> void convert(const T *from, T *to, int64_t n) { memcpy(to, from, n * sizeof(T)); }

// Sums the values of all ranks in their order, in pieces that stay in the first cache.
template <class T> void sum(const SharedArguments &arguments, uint32_t call, void *to) {
    using R = typename Total<T>::type;
    constexpr int64_t PIECE = 1024;
    R total[PIECE], converted[PIECE];
    const int64_t values = arguments.message.bytes / static_cast<int64_t>(sizeof(T));
    for (int64_t first = 0; first < values; first += PIECE) {
        const int64_t n = values - first < PIECE ? values - first : PIECE;
        for (int64_t rank = 0; rank < arguments.ranks; ++rank) {
            const R *from = load(reinterpret_cast<const T *>(arguments.slot(call, rank).values) + first, converted, n);
            if (rank)
                for (int64_t i = 0; i < n; ++i) total[i] = static_cast<R>(total[i] + from[i]);
            else
                memcpy(total, from, n * sizeof(R));
        }
        convert(total, static_cast<T *>(to) + first, n);
    }
}

inline void sum(const SharedArguments &arguments, uint32_t call, void *to) {
    switch (arguments.message.dtype) {
        case FLOAT32: return sum<float>(arguments, call, to);
        case FLOAT64: return sum<double>(arguments, call, to);
        case BFLOAT16: return sum<bf16>(arguments, call, to);
        case FLOAT16: return sum<fp16>(arguments, call, to);
        case INT8: return sum<int8_t>(arguments, call, to);
        case INT16: return sum<int16_t>(arguments, call, to);
        case INT32: return sum<int32_t>(arguments, call, to);
        case INT64: return sum<int64_t>(arguments, call, to);
        case UINT8: return sum<uint8_t>(arguments, call, to);
    }
}

// Sends this rank's message. Without values it is compared only.
inline void post(const SharedArguments &arguments) {
    const uint32_t call = arguments.calls() + 1;
    Segment &segment = *arguments.segment;
    Slot &own = arguments.slot(call, arguments.rank);
    own.message = arguments.message;
    if (arguments.values) memcpy(own.values, arguments.values, arguments.message.bytes);
    __atomic_store_n(&segment.ranks[arguments.rank].calls, call, __ATOMIC_RELEASE);
    __atomic_fetch_add(&segment.arrived.count, 1, __ATOMIC_SEQ_CST);
    const uint32_t all = call * static_cast<uint32_t>(arguments.ranks);
    if (is_open(segment.arrived, all)) wake(segment.arrived);
}

// Waits for the messages of all ranks, compares them, and sums their values.
inline Outcome collect(const SharedArguments &arguments, void *to) {
    const uint32_t call = arguments.calls();
    if (!wait(arguments.segment->arrived, call * static_cast<uint32_t>(arguments.ranks), arguments)) return WAITING;
    for (int64_t rank = 1; rank < arguments.ranks; ++rank)
        if (!same(arguments.slot(call, 0).message, arguments.slot(call, rank).message)) return DIFFERENT;
    if (arguments.values) sum(arguments, call, to);
    return DONE;
}

inline Outcome shared_all_reduce(const SharedArguments &arguments) {
    post(arguments);
    return collect(arguments, arguments.values);
}

inline Outcome shared_collect(const SharedArguments &arguments) { return collect(arguments, arguments.values); }

// The leader's part: the sum of this host as its result.
inline Outcome shared_lead(const SharedArguments &arguments) {
    Slot &result = arguments.result(arguments.calls());
    result.message = arguments.message;
    return collect(arguments, result.values);
}

// The leader's result is the sum of all hosts now, or there is none.
inline void shared_publish(const SharedArguments &arguments, Outcome outcome) {
    Segment &segment = *arguments.segment;
    const uint32_t call = arguments.calls();
    segment.outcome[call % 2] = outcome;
    __atomic_store_n(&segment.published.count, call, __ATOMIC_SEQ_CST);
    wake(segment.published);
}

// The part of the others: the result of their leader.
inline Outcome shared_take(const SharedArguments &arguments) {
    const uint32_t call = arguments.calls();
    if (!wait(arguments.segment->published, call, arguments)) return WAITING;
    const Outcome outcome = static_cast<Outcome>(arguments.segment->outcome[call % 2]);
    if (outcome == DONE && arguments.values)
        memcpy(arguments.values, arguments.result(call).values, arguments.message.bytes);
    return outcome;
}

// Tells the others that this rank will not call again.
inline void shared_leave(const SharedArguments &arguments) {
    __atomic_store_n(&arguments.segment->ranks[arguments.rank].has_left, 1, __ATOMIC_RELEASE);
}

// How far a rank is, with its message of a call: of its own call for a rank that looks at others, which may be one call
// ahead, or of the last one for 0.
inline Progress shared_progress(const SharedArguments &arguments, uint32_t call) {
    const Rank &rank = arguments.segment->ranks[arguments.rank];
    const uint32_t has_left = __atomic_load_n(&rank.has_left, __ATOMIC_ACQUIRE);  // before the calls, which it follows
    const uint32_t calls = __atomic_load_n(&rank.calls, __ATOMIC_ACQUIRE);
    return {calls, has_left, arguments.slot(call ? call : calls, arguments.rank).message};
}

}  // namespace
