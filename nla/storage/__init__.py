"""The choices of `storage=`: how the numbers of triplets are kept, and the fits that know it."""
