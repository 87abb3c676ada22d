// The order in which a pass reads the memory, and its division among threads: by plane or by period, see exports.cpp.
#pragma once

#include <stdint.h>

#include "arguments.h"
#include "dtypes.h"
#include "memory.h"

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
static int omp_get_num_threads() { return 1; }
#endif

namespace {

constexpr int64_t GROUP = 8192;           // values: the memory is walked backwards by runs of as many
constexpr int64_t SMALLEST_PLANE = 16;    // values: smaller planes are walked by period
constexpr int64_t SMALLEST_PERIOD = 512;  // values: shorter rows are taken several at a time
constexpr int64_t VALUES_PER_THREAD = 32768;

struct Walk {
    int64_t values, plane, period, channels;
    bool by_period, repeats;  // repeats: the channel of place v in a period is v % C, else v / S % C
    int64_t threads, quantum;  // threads begin at multiples of quantum: planes' values, or periods

    Walk(const Shape &shape, bool has_signs)
        : values(shape.values()), plane(shape.s), period(0), channels(shape.c),
          by_period(shape.channels_last || shape.s < SMALLEST_PLANE), repeats(shape.channels_last || shape.s == 1) {
        if (by_period) {
            int64_t row = repeats ? shape.c : shape.c * shape.s;
            int64_t least = smaller(SMALLEST_PERIOD, values), rows = (least + row - 1) / larger(row, 1);
            period = row * larger(rows, 1);
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

}  // namespace
