"""The way of the data, in the order of the files to read.

prepare   sources -> pieces, clean -> gather -> corpus (a folder, written once)
read      corpus -> rows (tokens, fitting, infilling, shuffle), dialogue -> mix (batches)
"""
