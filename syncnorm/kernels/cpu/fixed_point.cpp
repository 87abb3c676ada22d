// The passes that sum in fixed point, as functions of Python. They are compiled apart, without fused multiply-add.

#include "calls.h"
#include "fixed_point.h"

namespace {
PyMethodDef functions[] = {
    PASS(largest_input, InputArguments, a.shape.dtype),
    PASS(sums_of_input, InputArguments, a.shape.dtype),
    PASS(largest_gradient, GradientArguments, a.of.shape.dtype),
    PASS(largest_gradient_in_double, GradientArguments, a.of.shape.dtype),
    PASS(sums_of_gradient, GradientArguments, a.of.shape.dtype),
};
}  // namespace

// As syncnorm_function_ of exports.cpp.
EXPORT PyObject *NAME(syncnorm_fixed_point_, SYNCNORM_ISA)(PyObject *objects, int64_t number) {
    know(objects);
    return PyCFunction_NewEx(&functions[number], nullptr, nullptr);
}
