"""Probes `graph_bfs_1`, `graph_bfs_2` and `graph_parents`: a graph of which one step is asked for.

Source: OpenAI, GraphWalks, huggingface.co/datasets/openai/graphwalks (2025): a list of directed
edges, and the nodes at a depth of a breadth-first search, or the parents of a node. There one
question stands at the end of the prompt, nodes are hexadecimal and answers are judged by F1. Here
several questions are asked during decode, nodes are pairs of words, each node has two edges, which
stand in random order, and every question has as many answers as slots: two, or four at depth 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_heterocache.evaluation.prompt import largest_fitting
from vllm_heterocache.evaluation.suites.probes.probe import Drawn, Probe, ProbeTask
from vllm_heterocache.evaluation.suites.probes.source import of_one_length
from vllm_heterocache.evaluation.words import compounds

if TYPE_CHECKING:
    import random

    from vllm_heterocache.evaluation.suites.probes.source import Source

    Graph = dict[str, list[str]]  # node -> its two successors

INTRODUCTION = """\
You will be given a graph as a list of directed edges. A breadth-first search (BFS) returns the
nodes that are reachable at exactly its depth, without the starting node. The parents of a node are
the nodes that have an edge leading to it.

The graph has the following edges:
uvwx -> alke
abcd -> uvwx
abcd -> efgh
efgh -> uvwx

Operation: Perform a BFS from node abcd with depth 1.
Final Answer: uvwx, efgh
Operation: Find the parents of node uvwx.
Final Answer: abcd, efgh

The graph has the following edges:
"""
NODES_A_QUESTION = 8  # at least: about a quarter of the nodes has two parents
BFS = "Perform a BFS from node {node} with depth {depth}."
PARENTS = "Find the parents of node {node}."
QUESTION = "\nOperation: {operation}\nFinal Answer:"


def reached(graph: Graph, node: str, depth: int) -> set[str]:
    """Nodes at exactly `depth` steps from the node."""
    seen, now = {node}, {node}
    for _ in range(depth):
        now = {child for one in now for child in graph[one]} - seen
        seen |= now
    return now


def parents_of(graph: Graph) -> dict[str, set[str]]:
    """Of each node, the nodes with an edge to it."""
    found: dict[str, set[str]] = {node: set() for node in graph}
    for node, children in graph.items():
        for child in children:
            found[child].add(node)
    return found


def draw_graph(rng: random.Random, nodes: list[str]) -> Graph:
    """Every node with two successors, neither of them itself."""
    graph = {}
    for place, node in enumerate(nodes):
        first, second = rng.sample(range(len(nodes) - 1), 2)
        # of the other nodes: those from its own place on are one further
        graph[node] = [nodes[i + (i >= place)] for i in (first, second)]
    return graph


@dataclass(frozen=True)
class GraphWalk(ProbeTask):
    """depth: of the search; 0 asks for parents."""

    depth: int

    @property
    def name(self) -> str:
        return f"graph_bfs_{self.depth}" if self.depth else "graph_parents"

    def draw(self, source: Source, rng: random.Random, length: int, questions: int) -> Drawn:
        what = f"--tasks {self.name} with --set questions={questions}"
        pool = of_one_length(source.encode, compounds())
        nodes, state = rng.sample(pool, len(pool)), rng.getrandbits(64)

        def edges_of(size: int) -> tuple[Graph, str]:
            rng.seed(state)
            graph = draw_graph(rng, nodes[:size])
            edges = [f"{one} -> {child}" for one, both in graph.items() for child in both]
            rng.shuffle(edges)
            return graph, INTRODUCTION + "\n".join(edges) + "\n"

        size = largest_fitting(
            lambda size: len(source.opening(edges_of(size)[1])),
            length,
            NODES_A_QUESTION * questions,
            what,
        )
        graph, text = edges_of(size)
        asked = self._asked(graph, rng, questions)
        if len(asked) < questions:
            raise ValueError(
                f"{what} finds {len(asked)} nodes to ask for at --lengths {length}; take a larger "
                "length or fewer questions"
            )
        probes = [self._probe(source, node, answers) for node, answers in asked]
        return Drawn(source.opening(text), probes)

    def _asked(
        self, graph: Graph, rng: random.Random, questions: int
    ) -> list[tuple[str, list[str]]]:
        """Random nodes that have as many answers as slots, with the answers."""
        fit = []
        above = parents_of(graph)
        for node in rng.sample(list(graph), len(graph)):
            answers = reached(graph, node, self.depth) if self.depth else above[node]
            if len(answers) == 2 * max(self.depth, 1):
                fit.append((node, sorted(answers)))
            if len(fit) == questions:
                break
        return fit

    def _probe(self, source: Source, node: str, answers: list[str]) -> Probe:
        operation = (BFS if self.depth else PARENTS).format(node=node, depth=self.depth)
        leads = [QUESTION.format(operation=operation)] + [","] * (len(answers) - 1)
        return Probe(
            [source.encode(lead) for lead in leads],
            [source.encode(f" {answer}") for answer in answers],
            any_order=True,
        )
