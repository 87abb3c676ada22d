// Sums in fixed point, which come out the same in whatever order their terms are added; ../fixed_point.py says how.
//
// A digit is cut off by an addition. For |v| <= 2^E, v + 3 * 2^E rounds v to a multiple of 2^(E - 51), its first digit,
// and the bits of the sum, as an integer, are the digit and those of 3 * 2^E, the origin. So the bits are added up, and
// those of the origins taken off at the end.
//
// For the same bits everywhere, this is compiled without fused multiply-add: a vector and what is left of a row, or two
// instruction sets, might fuse differently.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "arguments.h"
#include "backward.h"
#include "memory.h"
#include "vector.h"
#include "walk.h"

namespace {

constexpr int64_t MOST_ROWS = 2048;  // of digits, up to 2^51 each, that an integer of 64 bits holds
constexpr int64_t LOW_BITS = 36;     // a sum is high * 2^36 + low
constexpr double NEXT_DIGIT = 0x1p-51;

// A register of values: its type, and the same wherever it lies in memory, which no template may deduce as its argument.
template <class Value> struct Register {
    typedef Value type __attribute__((vector_size(VECTOR)));
    typedef Value in_memory __attribute__((vector_size(VECTOR), aligned(alignof(Value)), may_alias));
    static constexpr int64_t size = VECTOR / sizeof(Value);
};
using Floats = Register<float>::type;
using Doubles = Register<double>::type;
typedef float FewFloats __attribute__((vector_size(VECTOR / 2), aligned(4), may_alias));  // as many as Doubles

template <class R> struct Integer { using type = int32_t; };
template <> struct Integer<double> { using type = int64_t; };

// The compiler takes four instructions to convert what one of the processor does.
inline Doubles widened(FewFloats values) {
#if defined(__AVX512F__)
    return _mm512_cvtps_pd(reinterpret_cast<__m256>(values));
#elif defined(__AVX__)
    return _mm256_cvtps_pd(reinterpret_cast<__m128>(values));
#else
    return __builtin_convertvector(values, Doubles);
#endif
}
inline FewFloats few(const float *from) { return *reinterpret_cast<const FewFloats *>(from); }
inline FewFloats few(const bf16 *from) {
#if defined(__AVX512F__)
    __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i *>(from));
    return reinterpret_cast<FewFloats>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
#elif defined(__AVX2__)
    __m128i halves = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(from));
    return reinterpret_cast<FewFloats>(_mm_slli_epi32(_mm_cvtepu16_epi32(halves), 16));
#else
    FewFloats values;
    for (int64_t j = 0; j < Register<double>::size; ++j) values[j] = single(from[j]);
    return values;
#endif
}

// take<X>(from): an X, which is a value or a register of values, from memory of type M.
template <class X, class M> inline X take(const M *from) {
    if constexpr (sizeof(X) <= sizeof(double)) return read(*from);
    else if constexpr (sizeof(X{}[0]) == sizeof(typename Arithmetic<M>::type)) return read_vector(from);
    else return widened(few(from));
}
template <class X, bool BY_PERIOD, class R> inline X of_entry(const R *values, int64_t entry) {
    if constexpr (BY_PERIOD) return take<X>(values + entry);
    else return X{} + *values;
}

template <class To, class From> inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof(To));
    return to;
}

// Add the bits of LEVELS digits of value + rest, where rest is below the first digit.
template <int LEVELS, class X, class I> inline void add_digits(X value, X rest, X origin, I *sums) {
    for (int level = 0; level < LEVELS; ++level, origin *= NEXT_DIGIT) {
        X moved = value + origin;
        sums[level] += bits_as<I>(moved);
        value -= moved - origin;
        if (level == 0) value += rest;
    }
}
template <int LEVELS, class X, class I> inline void take_off(X origin, uint64_t times, I *sums) {
    for (int level = 0; level < LEVELS; ++level, origin *= NEXT_DIGIT) sums[level] -= bits_as<I>(origin) * times;
}

// value² - square, where square is the rounded value², to the 106th bit of value².
template <class I, class X> inline X error_of_square(X value, X square) {
    X high = bits_as<X>(bits_as<I>(value) & ~((uint64_t{1} << 27) - 1)), low = value - high;
    return ((high * high - square) + 2.0 * (high * low)) + low * low;
}

// Keep the larger magnitude. They are compared as integers: those of NaN are the largest.
template <class Int, class X, class I> inline void keep_larger(X value, I &largest) {
    I magnitude = bits_as<I>(value) & static_cast<Int>(sizeof(Int) == 4 ? INT32_MAX : INT64_MAX);
    largest = magnitude > largest ? magnitude : largest;
}

// What each pass computes of a segment of memory of type M. `add` takes a value, or a register of values, and the arrays
// by entry at `entry`, which is 0 throughout by plane.
template <class M> struct Input {
    using R = typename Arithmetic<M>::type;
    static constexpr int LEVELS = sizeof(R) == 8 ? 2 : 1, OF_SQUARES = sizeof(R) == 8 ? 3 : 1;
    static constexpr int ROWS = 8;  // periods that are added up together
    const M *x;
    const R *weight;                       // or null
    const double *origin, *square_origin;  // by entry
    template <class X> X value(int64_t at) const {
        X value = take<X>(x + at);
        return weight ? take<X>(weight + at) == 0 ? X{} : value : value;
    }
};

template <class M, bool BY_PERIOD> struct LargestInput : Input<M> {
    using typename Input<M>::R;
    using Lane = R;
    using Int = typename Integer<R>::type;
    static constexpr int COUNT = 1;
    template <class X, class I> void add(int64_t at, int64_t, I *largest) const {
        keep_larger<Int>(this->template value<X>(at), *largest);
    }
};

// The digits of w x and of w x².
template <class M, bool BY_PERIOD> struct SumsOfInput : Input<M> {
    using typename Input<M>::R;
    using Input<M>::LEVELS, Input<M>::OF_SQUARES;
    using Lane = double;
    using Int = uint64_t;
    static constexpr int COUNT = LEVELS + OF_SQUARES;
    template <class X, class I> void add(int64_t at, int64_t entry, I *sums) const {
        X value = this->template value<X>(at), square = value * value, rest{};
        if constexpr (LEVELS > 1) rest = error_of_square<I>(value, square);
        if (this->weight) {
            X share = take<X>(this->weight + at);
            value = value * share, square = square * share, rest = rest * share;
        }
        add_digits<LEVELS>(value, X{}, of_entry<X, BY_PERIOD>(this->origin, entry), sums);
        add_digits<OF_SQUARES>(square, rest, of_entry<X, BY_PERIOD>(this->square_origin, entry), sums + LEVELS);
    }
    template <class X, class I> void take_off(int64_t entry, uint64_t times, I *sums) const {
        ::take_off<LEVELS>(of_entry<X, BY_PERIOD>(this->origin, entry), times, sums);
        ::take_off<OF_SQUARES>(of_entry<X, BY_PERIOD>(this->square_origin, entry), times, sums + LEVELS);
    }
};

template <class M> struct Gradient {
    using R = typename Arithmetic<M>::type;
    static constexpr int LEVELS = sizeof(R) == 8 ? 2 : 1;
    static constexpr int ROWS = 4;
    Operands<M> of;
    // by entry: the mean, also as two R, and what rounding may have added to x - mean, as the two R give it
    const double *mean;
    const R *high, *low, *rounding;
    const double *origin, *product_origin;
    template <class X> X without_void(X d, X dz, int64_t at) const {  // where nothing counts and no gradient comes
        if (!of.mask) return d;
        X weight = take<X>(of.mask + at);
        return weight == 0 ? dz == 0 ? X{} : d : d;
    }
};

template <class M, bool BY_PERIOD> struct LargestGradient : Gradient<M> {
    using typename Gradient<M>::R;
    using Lane = R;
    using Int = typename Integer<R>::type;
    static constexpr int COUNT = 2;
    template <class X, class I> void add(int64_t at, int64_t entry, I *largest) const {
        X dz = take<X>(this->of.dy + at);
        X d = take<X>(this->of.x + at) - of_entry<X, BY_PERIOD>(this->high, entry) - of_entry<X, BY_PERIOD>(this->low, entry);
        d = this->without_void(d, dz, at);
        X magnitude = d < 0 ? -d : d;
        keep_larger<Int>(dz, largest[0]);
        keep_larger<Int>(dz * (magnitude + of_entry<X, BY_PERIOD>(this->rounding, entry)), largest[1]);
    }
};

// The same in double, of x - mean that float cannot hold.
template <class M, bool BY_PERIOD> struct LargestGradientInDouble : Gradient<M> {
    using Lane = double;
    using Int = int64_t;
    static constexpr int COUNT = 2;
    template <class X, class I> void add(int64_t at, int64_t entry, I *largest) const {
        X dz = take<X>(this->of.dy + at), d = take<X>(this->of.x + at) - of_entry<X, BY_PERIOD>(this->mean, entry);
        keep_larger<Int>(dz, largest[0]);
        keep_larger<Int>(dz * this->without_void(d, dz, at), largest[1]);
    }
};

// The digits of dz and dz (x - mean), LEVELS of them each.
template <class M, bool BY_PERIOD> struct SumsOfGradient : Gradient<M> {
    using Gradient<M>::LEVELS;
    using Lane = double;
    using Int = uint64_t;
    static constexpr int COUNT = 2 * LEVELS;
    template <class X, class I> void add(int64_t at, int64_t entry, I *sums) const {
        X dz = take<X>(this->of.dy + at), d = take<X>(this->of.x + at) - of_entry<X, BY_PERIOD>(this->mean, entry);
        X product = dz * this->without_void(d, dz, at);
        add_digits<LEVELS>(dz, X{}, of_entry<X, BY_PERIOD>(this->origin, entry), sums);
        add_digits<LEVELS>(product, X{}, of_entry<X, BY_PERIOD>(this->product_origin, entry), sums + LEVELS);
    }
    template <class X, class I> void take_off(int64_t entry, uint64_t times, I *sums) const {
        ::take_off<LEVELS>(of_entry<X, BY_PERIOD>(this->origin, entry), times, sums);
        ::take_off<LEVELS>(of_entry<X, BY_PERIOD>(this->product_origin, entry), times, sums + LEVELS);
    }
};

template <bool FIRST, class A, class B> struct Either { using type = A; };
template <class A, class B> struct Either<false, A, B> { using type = B; };
struct Larger {
    template <class I> I operator()(I one, I other) const { return one > other ? one : other; }
};

// The sums or the largest values of `Of` over all the memory: segment(thread, at, entry, n) gives what it reads.
template <class Of> class Accumulation {
    using Lane = typename Of::Lane;
    using Int = typename Of::Int;
    using Lanes = typename Register<Lane>::type;
    using Ints = typename Register<Int>::type;
    using IntsInMemory = typename Register<Int>::in_memory;
    static constexpr int COUNT = Of::COUNT;
    static constexpr bool IS_SUM = Int(-1) > 0;
    static constexpr typename Either<IS_SUM, Add, Larger>::type combine{};
    static constexpr int64_t LANES = Register<Lane>::size, LOW = (int64_t{1} << LOW_BITS) - 1;

  public:
    explicit Accumulation(const Walk &w)
        : walk_(w), size_(COUNT * w.entries()),
          scratch_(3 * Scratch::bytes<int64_t>(w.threads * size_) + 2 * Scratch::bytes<int64_t>(w.channels)) {
        if (!scratch_) return;
        near_ = scratch_.array<Int>(walk_.threads * size_);
        high_ = scratch_.array<int64_t>(walk_.threads * size_), low_ = scratch_.array<int64_t>(walk_.threads * size_);
        highs_ = scratch_.array<int64_t>(walk_.channels), lows_ = scratch_.array<int64_t>(walk_.channels);
    }
    explicit operator bool() const { return static_cast<bool>(scratch_); }

    // result: (COUNT, 2, C), high and low of each sum; or (COUNT, C), the largest values, infinite where one is no number.
    template <class Segment> void run(Segment segment, double *result) {
        const int64_t entries = walk_.entries(), channels = walk_.channels;
        in_parallel(walk_.threads, [&](int64_t thread) {
            const int64_t start = thread * size_;
            memset(near_ + start, 0, size_ * sizeof(Int));
            memset(high_ + start, 0, size_ * sizeof(int64_t)), memset(low_ + start, 0, size_ * sizeof(int64_t));
            walk_.by_period ? add_periods(start, thread, segment) : add_planes(start, thread, segment);
        });
        for (int k = 0; k < COUNT; ++k) {
            memset(highs_, 0, channels * sizeof(int64_t)), memset(lows_, 0, channels * sizeof(int64_t));
            for (int64_t thread = 0; thread < walk_.threads; ++thread) gather(thread * size_ + k * entries);
            double *of_k = result + k * channels * (IS_SUM ? 2 : 1);
            for (int64_t c = 0; c < channels; ++c) {
                if constexpr (IS_SUM) {
                    of_k[c] = static_cast<double>(highs_[c] + (lows_[c] >> LOW_BITS));
                    of_k[channels + c] = static_cast<double>(lows_[c] & LOW);
                } else {
                    double largest = bits_as<Lane>(static_cast<Int>(highs_[c]));
                    of_k[c] = largest - largest == 0 ? largest : HUGE_VAL;
                }
            }
        }
    }

  private:
    template <class Segment> void add_planes(int64_t start, int64_t thread, const Segment &segment) {
        walk_.planes(thread, [&](int64_t at, int64_t entry, int64_t n) {
            const Of of = segment(thread, at, entry, n);
            Ints lanes[COUNT] = {};
            Int total[COUNT] = {};
            int64_t i = 0;
            for (; i + LANES <= n; i += LANES) of.template add<Lanes>(i, 0, lanes);
            for (; i < n; ++i) of.template add<Lane>(i, 0, total);
            for (int k = 0; k < COUNT; ++k) total[k] = combine(total[k], across<Int, LANES>(&lanes[k], combine));
            if constexpr (IS_SUM) of.template take_off<Lane>(0, n, total);
            for (int k = 0; k < COUNT; ++k) keep(total[k], start + k * walk_.entries() + entry);
        });
    }
    template <class Segment> void add_periods(int64_t start, int64_t thread, const Segment &segment) {
        int64_t added = 0;
        walk_.periods(thread, segment.in_place ? Of::ROWS : 1, [&](int64_t at, int64_t entry, int64_t n, int64_t rows) {
            if (entry == 0 && (added += rows) > MOST_ROWS) flush(start), added = rows;
            const Of of = segment(thread, at, entry, n);
            rows > 1 ? add_rows<Of::ROWS>(of, n, near_ + start + entry) : add_rows<1>(of, n, near_ + start + entry);
        });
        flush(start);
    }
    template <int TOGETHER> void add_rows(const Of of, int64_t n, Int *near) const {  // by value, to stay in registers
        const int64_t entries = walk_.entries(), period = walk_.period;
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) add_rows<TOGETHER, Lanes, Ints, IntsInMemory>(of, i, period, entries, near);
        for (; i < n; ++i) add_rows<TOGETHER, Lane, Int, Int>(of, i, period, entries, near);
    }
    template <int TOGETHER, class X, class I, class InMemory>
    static inline void add_rows(const Of &of, int64_t i, int64_t period, int64_t entries, Int *near) {
        I total[COUNT];
        for (int k = 0; k < COUNT; ++k) total[k] = *reinterpret_cast<InMemory *>(near + k * entries + i);
        for (int row = 0; row < TOGETHER; ++row) of.template add<X>(row * period + i, i, total);
        if constexpr (IS_SUM) of.template take_off<X>(i, TOGETHER, total);
        for (int k = 0; k < COUNT; ++k) *reinterpret_cast<InMemory *>(near + k * entries + i) = total[k];
    }
    void flush(int64_t start) {
        for (int64_t i = start; i < start + size_; ++i) {
            keep(near_[i], i);
            if (IS_SUM) near_[i] = 0;
        }
    }
    void keep(Int total, int64_t at) {
        const int64_t value = static_cast<int64_t>(total);
        if (IS_SUM) high_[at] += value >> LOW_BITS, low_[at] += value & LOW;
        else high_[at] = larger(high_[at], value);
    }
    void gather(int64_t at) {  // what a thread has of one k, to the channels
        for (int64_t e = 0; e < walk_.entries(); ++e) {
            const int64_t channel = walk_.channel(e);
            if (IS_SUM) highs_[channel] += high_[at + e], lows_[channel] += low_[at + e];
            else highs_[channel] = larger(highs_[channel], high_[at + e]);
        }
    }

    const Walk &walk_;
    int64_t size_;
    Scratch scratch_;
    Int *near_ = nullptr;                          // (threads, COUNT, entries)
    int64_t *high_ = nullptr, *low_ = nullptr;     // (threads, COUNT, entries)
    int64_t *highs_ = nullptr, *lows_ = nullptr;   // (C,)
};

inline const double *origins(const Walk &walk, Scratch &scratch, const double *of_channel) {
    double *of_entries = scratch.array<double>(walk.entries());
    if (of_channel) expand(walk, of_channel, of_entries);
    return of_entries;
}

template <class T, class M, class Of> struct InputSegments {
    using R = typename Arithmetic<T>::type;
    const T *x;
    const R *mask;
    const Walk &walk;
    const double *origin, *square_origin;
    M *values;
    R *weight;
    bool in_place;

    Of operator()(int64_t thread, int64_t at, int64_t entry, int64_t n) const {
        Of of;
        of.x = load(x + at, values + thread * SEGMENT, n);
        of.weight = mask ? weights(mask, walk, at, n, weight + thread * SEGMENT) : nullptr;
        of.origin = origin + entry, of.square_origin = square_origin + entry;
        return of;
    }
};

template <class T, class M, class Of> int over_input(const InputArguments &a, const Walk &walk) {
    using R = typename Arithmetic<T>::type;
    Accumulation<Of> accumulation(walk);
    Scratch scratch(2 * Scratch::bytes<double>(walk.entries()) + 2 * Scratch::bytes<R>(walk.threads * SEGMENT));
    if (!accumulation || !scratch) return NO_MEMORY;
    const double *origin = origins(walk, scratch, a.origins);
    const double *square_origin = origins(walk, scratch, a.origins ? a.origins + walk.channels : nullptr);
    InputSegments<T, M, Of> segment{static_cast<const T *>(a.x), static_cast<const R *>(a.mask), walk, origin, square_origin,
                                    scratch.array<M>(walk.threads * SEGMENT), scratch.array<R>(walk.threads * SEGMENT),
                                    sizeof(T) == sizeof(M) && !a.mask};
    accumulation.run(segment, a.result);
    return 0;
}

template <class T, class M, class Of> struct GradientSegments {
    using R = typename Arithmetic<T>::type;
    const Backward<T, M> &operands;
    Of common;
    bool in_place;

    Of operator()(int64_t thread, int64_t at, int64_t entry, int64_t n) const {
        Of of = common;
        of.of = operands(thread, at, entry, n);
        of.mean += entry, of.high += entry, of.low += entry, of.rounding += entry;
        of.origin += entry, of.product_origin += entry;
        return of;
    }
};

constexpr double ROUNDING = 0x1p-20;  // in units of the low part of the mean: what float adds to x - mean is far less

template <class T, class M, class Of> int over_gradient(const GradientArguments &a, const Walk &walk) {
    using R = typename Arithmetic<T>::type;
    Accumulation<Of> accumulation(walk);
    Scratch scratch(Affine<R>::bytes(walk) + Backward<T, M>::bytes(walk) + Scratch::bytes<double>(walk.channels) +
                    3 * Scratch::bytes<double>(walk.entries()) + 2 * Scratch::bytes<R>(walk.entries()));
    if (!accumulation || !scratch) return NO_MEMORY;
    Affine<R> map(scratch, walk);
    map.template fill<T>(scratch, walk, a.of);
    Backward<T, M> operands(a.of, walk, map, scratch, true);
    double *rest = scratch.array<double>(walk.channels);
    R *low = scratch.array<R>(walk.entries()), *rounding = scratch.array<R>(walk.entries());
    for (int64_t c = 0; c < walk.channels; ++c) rest[c] = map.mean[c] - static_cast<R>(map.mean[c]);
    expand(walk, rest, low);
    for (int64_t c = 0; c < walk.channels; ++c) rest[c] = fabs(rest[c]) * ROUNDING;
    expand(walk, rest, rounding);
    Of of;
    of.mean = origins(walk, scratch, map.mean);
    of.high = map.high, of.low = low, of.rounding = rounding;
    of.origin = origins(walk, scratch, a.origins);
    of.product_origin = origins(walk, scratch, a.origins ? a.origins + walk.channels : nullptr);
    accumulation.run(GradientSegments<T, M, Of>{operands, of, operands.in_place}, a.result);
    return 0;
}

// The passes, for memory of type T. One that takes dz from its epilogue has it in buffers.
template <template <class, bool> class Of, class T> int over_input(const InputArguments &a) {
    using M = typename InRegisters<T>::type;
    Walk walk(a.shape, false);
    return walk.by_period ? over_input<T, M, Of<M, true>>(a, walk) : over_input<T, M, Of<M, false>>(a, walk);
}
template <template <class, bool> class Of, class T, class M> int over_gradient(const GradientArguments &a) {
    Walk walk(a.of.shape, false);
    return walk.by_period ? over_gradient<T, M, Of<M, true>>(a, walk) : over_gradient<T, M, Of<M, false>>(a, walk);
}
template <template <class, bool> class Of, class T> int over_gradient(const GradientArguments &a) {
    if (takes_x_and_dy(a.of, true)) return over_gradient<Of, T, typename InRegisters<T>::type>(a);
    return over_gradient<Of, T, typename Arithmetic<T>::type>(a);
}
template <class T> int largest_input(const InputArguments &a) { return over_input<LargestInput, T>(a); }
template <class T> int sums_of_input(const InputArguments &a) { return over_input<SumsOfInput, T>(a); }
template <class T> int largest_gradient(const GradientArguments &a) { return over_gradient<LargestGradient, T>(a); }
template <class T> int largest_gradient_in_double(const GradientArguments &a) {
    return over_gradient<LargestGradientInDouble, T>(a);
}
template <class T> int sums_of_gradient(const GradientArguments &a) { return over_gradient<SumsOfGradient, T>(a); }

}  // namespace
