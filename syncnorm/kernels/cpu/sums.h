// The two reductions of each pass that sums, over planes and over periods.
#pragma once

#include <stdint.h>
#include <string.h>

#include "memory.h"
#include "vector.h"
#include "walk.h"

namespace {

constexpr int64_t ROWS_IN_SINGLE = 32;    // periods that are summed in R before they go to double
constexpr int ROWS_AT_A_TIME = 4;         // periods that are summed together
constexpr int64_t AHEAD = 1024;           // bytes: so far ahead of the sums their values are fetched

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

}  // namespace
