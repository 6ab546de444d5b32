"""CloudFormation templates with their functions worked out, as far as tests and drills need them."""

import re
from pathlib import Path

import yaml


class _Loader(yaml.SafeLoader):
    """YAML with CloudFormation's short forms as their long ones."""


def _short(loader, suffix, node):
    name = suffix if suffix in ("Ref", "Condition") else f"Fn::{suffix}"
    if isinstance(node, yaml.ScalarNode):
        value = loader.construct_scalar(node)
        return {name: value.split(".", 1) if suffix == "GetAtt" else value}
    if isinstance(node, yaml.SequenceNode):
        return {name: loader.construct_sequence(node, deep=True)}
    return {name: loader.construct_mapping(node, deep=True)}


_Loader.add_multi_constructor("!", _short)


def load(path):
    """A template as it is written."""
    return yaml.load(Path(path).read_text(), _Loader)


def resources(path, region="eu-central-1", **parameters):
    """The resources of a template that are made with these parameters, by their logical ids.

    What only AWS knows stays a name: that of a resource, or resource.attribute.
    """
    template = load(path)
    values = {
        "AWS::Region": region,
        "AWS::AccountId": "123456789012",
        "AWS::Partition": "aws",
        "AWS::URLSuffix": "amazonaws.com",
        "AWS::StackName": "stack",
    }
    for name, parameter in template.get("Parameters", {}).items():
        values[name] = parameters.pop(name, parameter.get("Default"))
        if values[name] is None:
            raise ValueError(f"{path}: {name} is missing")
    if parameters:
        raise ValueError(f"{path}: no such parameters: {', '.join(parameters)}")

    def condition(what):
        if isinstance(what, str):
            return condition(template["Conditions"][what])
        ((function, argument),) = what.items()
        match function:
            case "Fn::Not":
                return not condition(argument[0])
            case "Fn::Equals":
                return str(solved(argument[0])) == str(solved(argument[1]))
            case "Fn::And":
                return all(condition(one) for one in argument)
            case "Fn::Or":
                return any(condition(one) for one in argument)
            case "Condition":
                return condition(argument)
        raise ValueError(function)

    def named(name):
        return str(values.get(name, name))

    def solved(what):
        if isinstance(what, list):
            return [one for one in map(solved, what) if one is not None]
        if not isinstance(what, dict):
            return what
        if len(what) == 1:
            ((function, argument),) = what.items()
            match function:
                case "Ref":
                    return None if argument == "AWS::NoValue" else values.get(argument, argument)
                case "Fn::GetAtt":
                    return ".".join(argument)
                case "Fn::If":
                    return solved(argument[1] if condition(argument[0]) else argument[2])
                case "Fn::Sub":
                    text, own = (argument, {}) if isinstance(argument, str) else argument
                    own = {name: str(solved(value)) for name, value in own.items()}
                    return re.sub(
                        r"\$\{([^!}]+)\}", lambda m: own.get(m[1]) or named(m[1]), text
                    )
                case "Fn::Join":
                    parts = solved(argument[1])
                    return argument[0].join(map(str, parts)) if isinstance(parts, list) else parts
                case "Fn::Base64":
                    return solved(argument)
                case _ if function.startswith("Fn::"):
                    return {function: solved(argument)}
        kept = {name: solved(value) for name, value in what.items()}
        return {name: value for name, value in kept.items() if value is not None}

    return {
        name: solved({key: value for key, value in resource.items() if key != "Metadata"})
        for name, resource in template["Resources"].items()
        if "Condition" not in resource or condition(resource["Condition"])
    }
