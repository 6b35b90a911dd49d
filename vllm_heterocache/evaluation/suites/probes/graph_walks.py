"""Probes `graph_steps`, `graph_bfs` and `graph_parents`: walks of a graph, the whole context.

Source: OpenAI, GraphWalks, huggingface.co/datasets/openai/graphwalks (2025): a list of directed
edges, and the nodes at a depth of a breadth-first search, or the parents of a node. There one
question stands at the end of the prompt after solved examples, nodes are hexadecimal, and answers
are judged by F1. Here several questions are asked during decode without examples, nodes are
numbers, each has two edges, which stand in random order, and every question has as many answers as
slots.
`graph_bfs` and `graph_parents` have slots for the final answer alone. `graph_steps` writes the
search out as a model does that thinks before it answers: each edge is a slot, and the nodes that it
starts from are the right ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_heterocache.evaluation.prompt import largest_fitting
from vllm_heterocache.evaluation.suites.probes.probe import Drawn, Probe
from vllm_heterocache.evaluation.suites.probes.source import of_one_length

if TYPE_CHECKING:
    import random

    from vllm_heterocache.evaluation.suites.probes.source import Source

    Graph = dict[str, list[str]]  # node -> its two successors

INTRODUCTION = """\
You will be given a graph as a list of directed edges. A breadth-first search (BFS) returns the
nodes that are reachable at exactly its depth, without the starting node. The parents of a node are
the nodes that have an edge leading to it.

The graph has the following edges:
"""
NODES_A_QUESTION = 8  # at least: about a quarter of the nodes has two parents
BFS = "Perform a BFS from node {node} with depth {depth}."
PARENTS = "Find the parents of node {node}."


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
class GraphWalk:
    """depth: of the search; 0 asks for parents. in_steps: every edge on the way is asked for."""

    name: str
    depth: int
    in_steps: bool = False

    def draw(self, source: Source, rng: random.Random, length: int, questions: int) -> Drawn:
        what = f"--tasks {self.name} with --set questions={questions}"
        drawn = map(str, rng.sample(range(10**4, 10**5), min(length, 9 * 10**4)))
        nodes, state = of_one_length(source.encode, drawn), rng.getrandbits(64)

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
        probes = [
            one for node, answers in asked for one in self._probes(source, graph, node, answers)
        ]
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

    def _probes(self, source: Source, graph: Graph, node: str, answers: list[str]) -> list[Probe]:
        operation = (BFS if self.depth else PARENTS).format(node=node, depth=self.depth)
        question = f"\nOperation: {operation}\n"
        if self.in_steps:
            steps = []
            for one in (node, *graph[node]):
                edge = f"{one} ->"
                first = question + edge if one == node else f"\n{edge}"
                steps.append(_probe(source, [first, f"\n{edge}"], graph[one]))
            return steps
        leads = [question + "Final Answer:"] + [","] * (len(answers) - 1)
        return [_probe(source, leads, answers)]


def _probe(source: Source, leads: list[str], answers: list[str]) -> Probe:
    return Probe(
        [source.encode(lead) for lead in leads],
        [source.encode(f" {answer}") for answer in answers],
        any_order=True,
    )
