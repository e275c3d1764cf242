"""Imported by the server that children are forked from: the compiler is there before they are."""

import numpy as np

from curation.algorithms.knn import first_of_equal

first_of_equal(np.zeros((2, 4), np.float32))  # in this thread: a fork must find no other
