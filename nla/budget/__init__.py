"""How the parameters that are kept are shared among the matrices. `conf/budget/` names the ways."""
