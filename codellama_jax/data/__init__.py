"""The way of the data, in the order of the files to read.

prepare   sources, formats, inputs -> filters, private, overlap -> duplicates -> heldout -> pieces
          -> finish: a corpus, a folder written once; pipeline has the order, tasks the work
read      corpus -> rows (tokens, fitting, infilling, shuffle), dialogue -> mix (batches)
"""
