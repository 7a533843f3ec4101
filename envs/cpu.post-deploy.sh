# The embedded corpus: one data file of a source archive, whose dependencies are not wanted.
python -m pip install --no-deps pyate==0.5.3
