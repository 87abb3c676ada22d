// The kernels on CPUs: C++ with OpenMP, without torch. binding.py calls them; ../reference.py defines what they compute.
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

#include <stdint.h>

#include "arguments.h"
#include "backward.h"
#include "calls.h"
#include "moments.h"
#include "normalize.h"
#include "shared_memory.h"

namespace {
PyMethodDef functions[] = {
    PASS(moments, MomentsArguments, a.shape.dtype),
    PASS(normalize, NormalizeArguments, a.shape.dtype),
    PASS(reduce_grad, ReduceGradArguments, a.of.shape.dtype),
    PASS(grad_input, GradInputArguments, a.of.shape.dtype),
    {"agree", [](PyObject *, PyObject *const *given, intptr_t count) { return PyBool_FromLong(agree(given, count)); },
     METH_FASTCALL, nullptr},
};
}  // namespace

// Returns one of the functions, by its number, as a function of Python. `objects` are those that they have to know.
EXPORT PyObject *NAME(syncnorm_function_, SYNCNORM_ISA)(PyObject *objects, int64_t number) {
    know(objects);
    return PyCFunction_NewEx(&functions[number], nullptr, nullptr);
}

#ifdef SYNCNORM_DISPATCH
EXPORT uint32_t syncnorm_source() { return SYNCNORM_SOURCE; }

// Python compares these with the layouts by which it packs the structs.
#define EXPORT_SIZE(Struct) \
    EXPORT int64_t syncnorm_sizeof_##Struct() { return sizeof(Struct); }
EXPORT_SIZE(SharedArguments)
EXPORT_SIZE(Progress)
EXPORT_SIZE(Slot)

// What communicators/shared_memory.py calls.
EXPORT int64_t syncnorm_shared_bytes(int64_t ranks) { return Segment::bytes(ranks); }
EXPORT void *syncnorm_shared_result(const SharedArguments *arguments) {
    return &arguments->result(arguments->calls());
}
EXPORT int64_t syncnorm_shared_all_reduce(const SharedArguments *arguments) { return shared_all_reduce(*arguments); }
EXPORT void syncnorm_shared_post(const SharedArguments *arguments) { post(*arguments); }
EXPORT int64_t syncnorm_shared_collect(const SharedArguments *arguments) { return shared_collect(*arguments); }
EXPORT int64_t syncnorm_shared_lead(const SharedArguments *arguments) { return shared_lead(*arguments); }
EXPORT int64_t syncnorm_shared_take(const SharedArguments *arguments) { return shared_take(*arguments); }
EXPORT void syncnorm_shared_publish(const SharedArguments *arguments, int64_t outcome) {
    shared_publish(*arguments, static_cast<Outcome>(outcome));
}
EXPORT void syncnorm_shared_leave(const SharedArguments *arguments) { shared_leave(*arguments); }
EXPORT void syncnorm_shared_progress(const SharedArguments *arguments, int64_t call, Progress *progress) {
    *progress = shared_progress(*arguments, static_cast<uint32_t>(call));
}

EXPORT const char *syncnorm_isa() {  // the best of this machine
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
