"""What jobs will cost, before they start: counted from sizes, priced by a moment of measuring.

`counts` and `prices` know numbers only; `workload` and `estimate` import everything but `demo` and `cli`.
"""
