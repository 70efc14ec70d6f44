"""Graphs of LangGraph, each run twice: by plain LangGraph, and with its nodes on Lattice. The results are compared.

A scenario is a coroutine function that builds and calls a graph. With the synchronous caller it never suspends.
"""
